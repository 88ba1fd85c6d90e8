"""Every command of the readme, run in a copy of the folder: what it prints, the numbers of its proof, what it leaves.

Each lesson asserts its own claims; here the numbers are read once more, the tables are looked at, and lessons in which
something is broken on purpose have to fail. The scripts and two of the lessons run as they are typed, the others in
processes of the warm server.
"""

import ast
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from warm import WarmServer

FOLDER = Path(__file__).parents[1]
WRITTEN_BY_RUNS = shutil.ignore_patterns("output", "tests", "__pycache__", ".*_cache")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not re.match("PYTHON|MASTER_|GLOO_|NPROC", name)}
ENVIRONMENT["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""
# What the lessons import; torch.optim and DDP import the second when they are first used.
MODULES = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"]
MODULES += ["torch.distributed.tensor.parallel", "torch.distributed.pipelining"]
# What two machines call the first of them, and where the machines' own name leads.
NETWORKS = [("one machine", ""), *(("192.168.78.1", f"127.0.{i}.1") for i in (0, 1)), ("first", "127.0.1.1")]
# All three ways to start a process, and the lessons' usual one with shared memory.
AS_TYPED = ("bash", "python code01", "python code02")
# Command -> what has to be printed. A group is a number, and its bound stands behind: it has to be below.
SHOWN = {
    "python code01_processes.py": [
        r"fork child +\d+ +(?P<parent>\d+) +3\n(.*\n)*spawn child +\d+ +(?P=parent) +2\n",
        r"over a pipe: 3 4 -> 9 16\n",
        r"a pool of 2: squares \[0, 1, 4, 9, 16, 25, 36, 49\]",
        r"proof: lines seen {'fork': 3, 'forkserver': 2, 'spawn': 2}; with lock 2000 of 2000, without 1 of 2; ",
        r"; exits 3 7 -9\n",
    ],
    "python code02_shared_memory.py": [
        r"by the queue +\d+ +True +\[1\.0, 2\.0, 3\.0, 0\.0\]\na clone of it +\d+ +False +nothing\n",
        r"by a name +\d+ +True +\[8\.0, 9\.0, 0\.0, 0\.0\]\n",
        r"steps by process: \[300, 300\], weights \[1\.0, 2\.0, 3\.0, 4\.0\]\n",
        (r"proof: (\S+) bytes sent for 4,000,000, .* loss \d+\.\d -> (\S+)\n", 1000, 1e-4),
    ],
    "python code03_send_recv.py": [
        r"backend gloo, world size 3",
        r" 0 +\d+ +3  \[20\.0, 21\.0\] +\[\]\n",
        r" 1 +\d+ +0  \[0\.0, 1\.0\] +\[\[0\.0, 1\.0, 2\.0\], \[3\.0, 4\.0, 5\.0\]\]\n",
        r"proof: the token comes back as 3 ",
    ],
    "python code04_collectives.py": [
        r"broadcast .*\n.*\n +0 +0 +1 +2 +-> +10 +11 +12\n.*\n +2 +20 +21 +22 +-> +10 +11 +12\n",
        r"scatter .*\n.*\n +0 +0 +1 +2 +-> +0\n +1 +-> +1\n +2 +-> +2\n",
        r"\ngather .*\n.*\n +0 +0 +-> +0 +10 +20\n +1 +10 +-> \n +2 +20 +-> \n",
        r"\nreduce to .*\n.*\n +0 +0 +1 +2 +-> +30 +33 +36\n +1 +10 +11 +12 +-> \n",
        r"all_reduce .*\n.*\n( +\d.*-> +30 +33 +36\n){3}",
        r"all_gather\n.*\n( +\d.*-> +0 +10 +20\n){3}",
        r"reduce_scatter .*\n.*\n +0 +0 +1 +2 +-> +30\n +1 +10 +11 +12 +-> +33\n +2 +20 +21 +22 +-> +36\n",
        r"all_to_all\n.*\n +0 +0 +1 +2 +-> +0 +10 +20\n +1 +10 +11 +12 +-> +1 +11 +21\n.* +2 +12 +22\n",
        r"barrier .*\n.*\n +0 +0 +-> +\d+\n",
        r"proof: 9 of 9 collectives end on 3 ranks as they should, over gloo\n",
    ],
    "bash run_code05.sh": [
        r"\+ exec torchrun .*code05_torchrun\.py\n",
        r"RANK +0 +1\n +LOCAL_RANK +0 +1\n +WORLD_SIZE +2 +2\n +LOCAL_WORLD_SIZE +2 +2\n",
        r"all_to_all\n.*\n +0 +0 +1 +-> +0 +10\n +1 +10 +11 +-> +1 +11\n",
        r"proof: 9 of 9 collectives end on 2 ranks as they should, over gloo\n",
    ],
    "python code07_data_parallel.py": [
        r" 0  0 2 4 6 +1 3 5 +(\d\.\d+) +\1 +(?!\1)\d\.\d+\n",
        r" 2  14 {20,}(\d\.\d+) +\1 +(?!\1)\d\.\d+\n",
        (r"proof: after 15 steps 2 ranks differ from one process by (\S+); ", 1e-12),
        r"with the mean of means they would by \d\.\de-0[123]\n",
    ],
    "python code07_sampler.py": [
        r" 0 +0 1 5 4 \| 6 3 2 0 +0 1 5 4 \| 6 3 2 0 +0 1 5 \| 6 3 2 *\n +1 +2 3 6 5 \| 4 0 1 2 +0 1 5 4 \| 6 3 2 0 ",
        r"epoch 0: row 0 twice, with drop_last no row 4; mean 2\.625, in truth 3\.000\n",
        (r"proof: 3 orders with set_epoch, 1 without; 7 rows read 8 times, or 6; .*\[4, 3\] .* within (\S+) ", 1e-12),
    ],
    "bash run_code08.sh": [
        r"each gradient +48 +0 .*\nbuckets, after +6 +0 .*\nbuckets, by hooks +6 +5 .*\nDDP +\d+ +[1-9]",
        r"\nDDP +6 +5 +\S+ +0 .*\nDDP, views +6 +5 +\S+ +48 ",
        (r"proof: 48 .* 6, 5 begun early; off DDP by (\S+); 0 gradients are views of its buckets, 48 if", 1e-6),
    ],
    "python code08_no_sync.py": [
        r"sync each .*\[1, 2, 3, 4\].*\nno_sync .*\[0, 0, 0, 1\].*\nbackward .*\[1, 2, 3, 4\].*\n.* by 3\.0e\+00\n",
        (r"proof: 4 all-reduces became 1, and stay 4 if only backward .* within (\S+) of", 1e-12),
    ],
    "python code09_zero.py": [
        r"DDP +after backward +131,072 +131,072 +262,144 +524,288  all_reduce, in buckets\n",
        r"ZeRO-1 in backward +131,072 +131,072 +131,072 .*\n.* 393,216  all_gather 1 reduce_scatter 1\n",
        r"ZeRO-2 in backward +131,072 +81,920 +131,072 .*\n.* +131,072 +65,536 .* all_gather 1 reduce_scatter 1\n",
        r"ZeRO-3 in backward +98,304 +81,920 +131,072 .*\n.* +65,536 +65,536 .* all_gather 2 reduce_scatter 1\n",
        (r"proof: .* \[524288, 393216, 327680, 262144\] bytes after backward; weights within (\S+)\n", 1e-12),
    ],
    "python code10_fsdp2.py": [
        r"rank 1 holds 3,600 of 7,200 bytes, \(12, 24\) of the first weight: \(Shard\(dim=0\),\)\n",
        r"files: \.metadata __0_0\.distcp __1_0\.distcp\n",
        r"rank 2 holds 2,400 of 7,200 bytes, \(8, 24\)",
        r" 3 +(0\.\d{6})\d\d +\1\d\d\n",
        (r"proof: 18 of 18 tensors read bit for bit; 3 steps later within (\S+)\n", 1e-6),
    ],
    "python code11_tensor_parallel.py": [
        r"first weight's +\[16, 8\] .*\nfirst bias's +\[16\] .*\nsecond weight's +\[8, 16\] ",
        r"parameters on a rank: 280 of 552; all-reduces by hand: forward backward\n",
        (r"proof: output and all gradients within (\S+) by hand, (\S+) by torch\n", 1e-12, 1e-12),
    ],
    "python code11_device_mesh.py": [
        r" 0 +\(0, 0\) +101 +11 +101 +11 +64 of 256 .*\n.*\n +2 +\(1, 0\) +101 +1100 +101 +1100 +64 of 256 ",
        (
            r"proof: 4 ranks have the sums of hand-made groups, each 1/4 of a matrix; .* within (\S+) of one process\n",
            1e-12,
        ),
    ],
    "python code12_pipeline.py": [
        r"stage 2 [A-Fa-f.]+ keeps 6\n",
        r"stage 2 [A-Fa-f.]+ keeps 1\n",
        r"bubble \d+\.\d%; \(p - 1\) / \(m \+ p - 1\) = 25\.0%\n",
        (r"proof: gradients within (\S+) of .*{'GPipe': \[6, 6, 6\], '1F1B': \[3, 2, 1\]}\n", 1e-12),
    ],
    "python code12_schedules.py": [
        r"GPipe +stage 2 FFFFFFBBBBBB keeps 6\n1F1B +stage 0 FFFBFBFBFBBB keeps 3\n",
        r"\n1F1B +stage 2 FBFBFBFBFBFB keeps 1\n",
        (r"proof: loss and gradients within (\S+) of .*{'GPipe': \[6, 6, 6\], '1F1B': \[3, 2, 1\]}\n", 1e-12),
    ],
    "python code13_ring_attention.py": [
        r"bytes of scores at a time: 8,192; in full 73,728\n",
        r" 0  0 .*\n +1  1 0 .*\n +2  2 1 0 ",
        (r"proof: output and gradients within (\S+) of full attention, with 1/9 of its scores in memory\n", 1e-5),
    ],
    "python code13_zigzag.py": [
        r"contiguous: 18 blocks, as slow as 10 .*\n(.*\n){3} +2 +\(4, 5\) +2\.0 +4\.0 +4\.0 +10\.0\n",
        r"zig-zag: 18 blocks, as slow as 6 .*\n.*\n +0 +\(0, 5\) +2\.0 +2\.0 +2\.0 +6\.0\n",
        (r"proof: output within (\S+) of full attention; .* all steps 10 and 6 blocks long\n", 1e-5),
    ],
    "python code14_failure.py": [
        r"rank 2 dies; exit codes \[1, 1, 13\]\n  rank 0 after .* s: (?!none|Timed out).*\n",
        r"rank 2 hangs; exit codes \[1, 1, -9\]\n(.*\n){0,1}  rank [01] after .* s: Timed out waiting 2000ms",
        r"\[Rank 0\]: Rank 2 failed to pass monitoredBarrier in 2000 ms\n",
        r"proof: a death is seen after .* monitored_barrier names rank 2\n",
    ],
    "bash run_code14.sh": [
        r"attempt 0: 2 ranks begin .*\n(.*\n)*rank 1: dies in step 7\n(.*\n)*attempt 1: .* begin with step 6\n",
        r"with the restart +(\[.*\])\n +without a failure +\1\n",
        r"proof: 1 restart, from step 6 of 10; weights and momentum are equal bit for bit\n",
    ],
}
# Lesson and what is broken in it.
BROKEN = [
    ("code07_data_parallel.py", "own = rows[rank::WORLD]", "own = rows[0::WORLD]"),
    ("code07_sampler.py", "            sampler.set_epoch(epoch)\n", "            pass\n"),
    ("code07_sampler.py", ".sum(0) / WORLD\n", ".mean(0)\n"),
    ("code08_no_sync.py", 'model.no_sync() if quiet and way != "backward alone"', 'model.no_sync() if way == "-"'),
    ("code09_zero.py", 'calls.append("reduce_scatter")\n', 'calls.append("reduce_scatter")\n    full = full * WORLD\n'),
    ("code11_device_mesh.py", 'mesh_dim_names=("data", "tensor")', 'mesh_dim_names=("tensor", "data")'),
    ("code11_device_mesh.py", 'mesh.get_local_rank("data")', 'mesh.get_local_rank("tensor")'),
    ("code11_tensor_parallel.py", "        dist.all_reduce(gradient)\n", ""),
    ("code12_pipeline.py", "/ MICRO if rank", "/ 1 if rank"),
    ("code12_schedules.py", "WORLD - stage - 1", "WORLD - stage"),
    ("code13_ring_attention.py", "output = output * shrink +", "output = output +"),
    ("code13_zigzag.py", "(rank, 2 * WORLD - 1 - rank)", "(rank, WORLD + rank)"),
    ("code13_zigzag.py", "output[i] * shrink +", "output[i] +"),
]


@pytest.fixture
def folder(tmp_path):
    """The folder as a user may have it: copied out, with nothing that a run has written, under an awkward name."""
    return shutil.copytree(FOLDER, tmp_path / "别处 elsewhere" / "multi_process", ignore=WRITTEN_BY_RUNS)


@pytest.fixture(scope="session")
def server():
    server = WarmServer(MODULES, ENVIRONMENT)
    yield server
    server.close()


def start(command: str, folder: Path, *prefix: str, **variables: str) -> subprocess.Popen:
    """Starts a command of the readme from another folder, with a mark that all its processes inherit."""
    program, file = command.split()
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [*prefix, sys.executable if program == "python" else program, str(folder / file)],
        cwd=folder.parent,
        env=ENVIRONMENT | {"RUN_MARK": mark} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
        # a suite that was started in the background ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.mark = mark
    return process


def finish(process: subprocess.Popen) -> str:
    """What it printed. Ends what is left by the ids of the processes, and complains of it."""
    try:
        text, _ = process.communicate(timeout=120)
        left = end_what_is_left(process.mark, process.pid)
    except subprocess.TimeoutExpired:
        left = end_what_is_left(process.mark, process.pid, seconds=0)
        text, _ = process.communicate()
    assert not left, f"left: {left}\n{text}"
    return text


def run_warm(lesson: str, folder: Path, server: WarmServer) -> tuple[int, str]:
    """Status and text of a lesson in a process of the server, otherwise as by `start` and `finish`."""
    mark = uuid.uuid4().hex
    ended = server.run(folder / lesson, folder.parent, seconds=120, RUN_MARK=mark)
    left = end_what_is_left(mark, ended.session)
    text = ended.stdout + ended.stderr
    assert not left, f"left: {left}\n{text}"
    return ended.status, text


def end_what_is_left(mark: str, session: int, seconds: float = 5) -> list[psutil.Process]:
    """Kills the processes of a command that are still there after so many seconds.

    Helpers of multiprocessing need a moment: they end when they see that the program has.
    """
    deadline = time.time() + seconds
    while (left := find_processes(mark, session)) and time.time() < deadline:
        time.sleep(0.1)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return left


def find_processes(mark: str, session: int) -> list[psutil.Process]:
    """By the mark, since torchrun's ranks have sessions of their own, and by the session, since a forked process shows
    the environment with which the server began.

    Args:
        session: one that a test began, so the id of a process of its own; 0 is that of the machine's.
    """
    assert session > 1
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            own = os.getsid(process.pid) == session or process.environ().get("RUN_MARK") == mark
            if own and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def check(text: str, patterns: list) -> None:
    for pattern in patterns:
        pattern, *bounds = (pattern,) if isinstance(pattern, str) else pattern
        found = re.search(pattern, text)
        assert found, f"{pattern}\nis not in\n{text}"
        for number, bound in zip(found.groups() if bounds else (), bounds, strict=True):
            assert float(number) < bound, f"{number} should be below {bound}\n{text}"


@pytest.mark.parametrize("command", SHOWN)
def test_lesson_proves_its_point_and_leaves_no_process(command, folder, server):
    if command.startswith(AS_TYPED):
        process = start(command, folder)
        text = finish(process)
        status = process.returncode
    else:
        status, text = run_warm(command.split()[1], folder, server)
    assert status == 0, text
    check(text, SHOWN[command])


@pytest.mark.parametrize("way", ["as typed", "warm"])
def test_process_that_a_lesson_leaves_is_seen(way, tmp_path, server):
    """As typed in another session, as torchrun's ranks are; warm with the server's environment, as all are."""
    child = "os.setsid(); time.sleep(60)" if way == "as typed" else "time.sleep(60)"
    (tmp_path / "leaves.py").write_text(f"import os, time\nif not os.fork():\n    {child}\n")
    if way == "as typed":
        process = start("python leaves.py", tmp_path)
        process.wait(timeout=120)
        mark, session = process.mark, process.pid
    else:
        mark, session = uuid.uuid4().hex, server.run(tmp_path / "leaves.py", tmp_path, seconds=120).session
    assert len(end_what_is_left(mark, session, seconds=0)) == 1


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(params=NETWORKS, ids=" ".join)
def machines(request):
    """What runs a command on each of two machines, and the first one's address, or its name.

    Network namespaces joined by a cable, their addresses above 127.0.x.1: of two, gloo lets the larger call the other.
    """
    address, own = request.param
    if address == "one machine":
        yield [[], []], "127.0.0.1"
        return
    names = [f"lesson-{os.getpid()}-{node}" for node in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True) if shutil.which("ip") else None
        pytest.skip(f"no network namespaces here ({error})")
    for node, name in enumerate(names):
        ip("-n", name, "addr", "add", f"192.168.78.{node + 1}/24", "dev", f"cable{node}")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", f"cable{node}", "up")
        Path("/etc/netns", name).mkdir(parents=True)  # what `ip netns exec` shows as /etc
        lines = ["127.0.0.1 localhost", f"{own} {os.uname().nodename}", f"{'192.168.78.1' if node else own} first"]
        Path("/etc/netns", name, "hosts").write_text("\n".join([*lines, ""]))
    yield [["ip", "netns", "exec", name] for name in names], address
    for name in names:
        ip("netns", "delete", name)
        shutil.rmtree(f"/etc/netns/{name}")


def test_two_nodes_form_one_job(folder, machines):
    (first_on, second_on), address = machines
    variables = {"MASTER_ADDR": address, "MASTER_PORT": free_port()}
    second = start("bash run_code062.sh", folder, *second_on, **variables)  # may come first: it waits
    first = start("bash run_code061.sh", folder, *first_on, **variables)
    texts = [finish(first), finish(second)]
    assert (first.returncode, second.returncode) == (0, 0), texts
    for node, text in enumerate(texts):
        assert f"this is node {node} of 2\n" in text
        check(
            text,
            [r"\n +2 +1 +0 +\d+ +\S+ +100 +1100 +1111 +1111\n", r"proof: 2 launchers, 4 ranks, one job: 11 \+ 1100 "],
        )


def test_node_that_waits_for_the_other_ends_on_ctrl_c(folder):
    process = start("bash run_code062.sh", folder, MASTER_PORT=free_port())
    assert any(line.startswith("+ wait") for line in process.stdout)
    time.sleep(3)  # torchrun has begun to wait; before that it would end, too
    os.killpg(process.pid, signal.SIGINT)
    finish(process)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(("lesson", "right", "wrong"), BROKEN)
def test_broken_lesson_fails(lesson, right, wrong, folder, server):
    path = folder / lesson
    assert path.read_text().count(right) == 1
    path.write_text(path.read_text().replace(right, wrong))
    status, text = run_warm(lesson, folder, server)
    assert status == 1 and "AssertionError" in text and "proof:" not in text, text


def test_lesson_for_torchrun_says_how_to_start_it(folder, server):
    message = "error: this lesson needs torchrun to start it: bash run_code05.sh\n"
    assert run_warm("code05_torchrun.py", folder, server) == (1, message)


def test_lessons_find_in_torch_what_they_name():
    """Without more imports than `import torch`: the server has more, and would hide that a lesson lacks one."""
    nodes = [node for path in FOLDER.glob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    names = sorted(name for name in names if re.fullmatch(r"(torch|dist)(\.\w+)+", name))
    find = "import sys, torch\nimport torch.distributed as dist\nfor name in sys.argv[1:]: eval(name)"
    run = subprocess.run([sys.executable, "-c", find, *names], capture_output=True, text=True, timeout=120)
    assert names and run.returncode == 0, run.stderr


def test_lessons_are_short_and_share_nothing():
    lessons = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
    for name, text in lessons.items():
        assert text.count("\n") < 120, name
        for node in ast.walk(ast.parse(text)):
            imported = {alias.name for alias in getattr(node, "names", []) if isinstance(node, ast.Import)}
            imported |= {node.module} if isinstance(node, ast.ImportFrom) else set()
            assert not imported & set(lessons), name
    pair = [lessons[name] for name in ("code04_collectives", "code05_torchrun")]
    assert len({re.search(r"def show\(.*?    return sum\(right\)\n", text, re.S)[0] for text in pair}) == 1
    for path in FOLDER.glob("*.sh"):
        assert path.read_text().count("\n") < 50, path.name


def test_readme_has_every_command():
    blocks = re.findall(r"```bash\n(.*?)```", (FOLDER / "readme.md").read_text(encoding="utf-8"), re.S)
    commands = [line for block in blocks for line in block.splitlines() if not line.startswith("pip ")]
    assert sorted(commands) == sorted([*SHOWN, "bash run_code061.sh", "bash run_code062.sh"])
