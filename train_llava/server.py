"""uvicorn's server for an application of app.py: slow and idle clients are dropped, and all are told when it ends."""

# The same in every recipe that has it: python tests/copies.py --fix FILE

import asyncio

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10  # a client that hasn't asked by then is dropped
SPARE_CONNECTIONS = 200  # open sockets beside those that wait in the queue; far below the usual limit of 1024 files


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, that closes the socket idle for longest where there are too many."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        others = [connection for connection in self.connections if not connection.transport.is_closing()]
        if len(others) > SPARE_CONNECTIONS + self.config.app.state.max_queue:
            idle = [connection for connection in others if connection.is_idle()]
            min(idle, key=lambda connection: connection.idle_since).transport.abort()

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete


class Server(uvicorn.Server):
    """uvicorn's server, that drops clients who are slow to ask, and ends by telling those it serves."""

    async def on_tick(self, counter: int) -> bool:
        now = asyncio.get_running_loop().time()
        for connection in list(self.server_state.connections):
            if connection.is_idle() and now - connection.idle_since > HEADER_SECONDS:
                connection.transport.close()
        return await super().on_tick(counter)

    async def shutdown(self, sockets=None) -> None:
        self.config.app.state.stopping = True
        asyncio.get_running_loop().call_later(3, self.drop_connections)  # of clients who don't read what they are told
        await super().shutdown(sockets)

    def drop_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def create_server(app: FastAPI, host: str = "127.0.0.1", port: int = 0, log_level: str = "info") -> Server:
    """The server of an application from `create_app`; port 0 takes a free one."""
    # asyncio accepts as many sockets at once as the backlog has, before the first of them can be refused.
    settings = {"backlog": 64, "http": Connection, "ws": "none", "timeout_graceful_shutdown": 5}
    return Server(uvicorn.Config(app, host, port, log_level=log_level, **settings))
