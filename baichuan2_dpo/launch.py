"""torchrun whose last line is the run's own error, and which finds the network interface between machines.

    python launch.py --nproc_per_node 2 train.py ...       the flags are torchrun's

Where a rank ends with an error it has said so; torchrun adds a traceback of its own below, which is left out here.
"""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import logging
import os
import signal
import socket
import sys

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def own_address(address: str) -> str:
    """The address from which this machine would send to `address`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent:
        unsent.connect((address, 9))
        return unsent.getsockname()[0]


def find_interface(address: str) -> str:
    """The network interface that leads to `address`.

    Left to themselves gloo and NCCL may ask what address the machine's own name has, and in containers, Debian and
    Ubuntu /etc/hosts says 127.0.x.1, where no other machine can reach it (pytorch#8672).
    `address` may be that very name: then it's the interface of the default route, without one the first that is up.
    """
    own, found = own_address(address), [(name, one) for name, some in psutil.net_if_addrs().items() for one in some]
    names = {one.address: name for name, one in found if one.family == socket.AF_INET}
    if own.startswith("127.") and address != "localhost" and not address.startswith("127."):
        try:
            own = own_address("198.51.100.1")  # nobody has it (RFC 5737): the way there is the default route
        except OSError:
            up = {name for name, one in psutil.net_if_stats().items() if one.isup}
            own = next((one for one, name in names.items() if name in up and not one.startswith("127.")), own)
    return names[own]


def main():
    args = parse_args(sys.argv[1:])
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        if args.nnodes not in ("1", "1:1"):
            interface = find_interface(args.master_addr)
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        run(args)
    except socket.gaierror as error:
        sys.exit(f"error: MASTER_ADDR {args.master_addr}: {error.strerror}")
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            reason = "; the kernel does so where memory runs out" if name == "SIGKILL" else ""
            sys.exit(f"error: process {rank} was ended from outside by {name}{reason}")
        sys.exit(failure.exitcode)
    except (SignalException, KeyboardInterrupt) as end:
        sys.exit(128 + getattr(end, "sigval", signal.SIGINT))


if __name__ == "__main__":
    main()
