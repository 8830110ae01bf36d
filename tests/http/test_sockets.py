"""TLS over a socket, with a server that sends the records of the test."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxibly.config import Timeouts
from fluxibly.providers.http._limits import LimitPassed, Limits
from fluxibly.providers.http._sockets import TLSSocket
from fluxibly.providers.http._sockets_threads import BlockingSocket, finished

CERTIFICATE = Path(__file__).parents[1] / "data" / "localhost.pem"


def speak(sock: socket.socket, records: list[bytes], clean: bool) -> None:
    """Do the handshake, then send all records in a single piece, with TLS's close_notify if `clean`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=True)
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            sock.sendall(outgoing.read())
            incoming.write(sock.recv(65536))
    for record in records:
        tls.write(record)
    if clean:
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.unwrap()
    sock.sendall(outgoing.read())


@contextlib.contextmanager
def connected(records: list[bytes], *, clean: bool = False) -> Iterator[tuple[TLSSocket, socket.socket]]:
    """Yield the client's socket, after the handshake, and the server's socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=speak, args=(theirs, records, clean))
        thread.start()
        secure = TLSSocket(BlockingSocket(ours), ssl.create_default_context(cafile=CERTIFICATE), "localhost")
        finished(secure.handshake(Limits(Timeouts(), total=5.0)))
        thread.join(5)
        yield secure, theirs


class TestTLS:
    def test_a_record_in_memory_is_seen(self) -> None:
        """A record that was received with another waits in memory, where a look at the socket does not find it."""
        with connected([b"one", b"two"]) as (secure, _):
            assert finished(secure.receive(5)) == b"one"
            assert not secure.quiet()

    def test_a_record_byte_by_byte(self) -> None:
        """The limit is on the whole read, however many reads of the socket a record takes."""
        over = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                theirs.sendall(b"\x17\x03\x03\x40\x00")  # the header of a record of 16 KB
                while not over.wait(0.02):
                    theirs.sendall(b"x")

        with connected([]) as (secure, theirs):
            thread = threading.Thread(target=trickle)
            thread.start()
            timer = threading.Timer(5, over.set)
            timer.start()
            with pytest.raises(LimitPassed):
                finished(secure.receive(0.2))
            assert not over.is_set()
            over.set()
            timer.cancel()
            thread.join(5)

    def test_no_time_left(self) -> None:
        """A wait of no time at all passes its limit, though a socket takes it for a call that does not block."""
        ours, theirs = socket.socketpair()
        with ours, theirs, pytest.raises(LimitPassed):
            finished(BlockingSocket(ours).receive(0.0))

    def test_session_tickets_are_not_data(self) -> None:
        """An idle connection with only session tickets unread is quiet."""
        with connected([b"one"]) as (secure, _):
            assert finished(secure.receive(5)) == b"one"
            assert secure.quiet()

    @pytest.mark.parametrize("clean", [True, False])
    def test_the_end(self, clean: bool) -> None:
        """Without TLS's close_notify, the end of the connection is an error, because the data may be cut short."""
        with connected([b"one"], clean=clean) as (secure, theirs):
            theirs.close()
            assert finished(secure.receive(5)) == b"one"
            assert not secure.quiet()
            if clean:
                assert finished(secure.receive(5)) == b""
            else:
                with pytest.raises(ConnectionResetError):
                    finished(secure.receive(5))
