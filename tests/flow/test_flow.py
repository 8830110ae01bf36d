"""Flows without a driver: the verbs, composition, and the innermost flow."""

from __future__ import annotations

import pytest
from support.observing import Observing

from fluxibly.errors import ServerError, StreamInterrupted
from fluxibly.flow import Middleware, compose, perform, sleep
from fluxibly.flow.compose import layer_name, send
from fluxibly.flow.effects import END, Perform, Release, Send, Sleep, Source
from fluxibly.signals import Signal
from fluxibly.types import Chunk, Request, Response, Usage, observed

REQUEST = Request(model="m", messages="hi")


def finish(flow, value=None):
    """Send a value that ends the flow, and return its result."""
    with pytest.raises(StopIteration) as stopped:
        flow.send(value)
    return stopped.value.value


class TestVerbs:
    def test_sleep(self):
        """`sleep` yields the seconds, and returns whether the signal is set."""
        flow = sleep(2.5)
        assert next(flow) == Sleep(2.5)
        assert finish(flow) is False
        signal = Signal()
        flow = sleep(1, until=signal)
        assert next(flow).until is signal
        assert finish(flow, True) is True

    def test_perform(self):
        """`perform` yields both functions and returns the value that the driver sends."""
        call, acall = object(), object()
        flow = perform(call, acall)
        assert next(flow) == Perform(call, acall)
        assert finish(flow, 5) == 5

    @pytest.mark.parametrize(
        ("seconds", "kind", "got"),
        [
            (-1, ValueError, "-1"),
            (-0.5, ValueError, "-0.5"),
            (float("nan"), ValueError, "nan"),
            (float("inf"), ValueError, "inf"),
            ("1", TypeError, "'1'"),
            (None, TypeError, "None"),
            (True, TypeError, "True"),
        ],
    )
    def test_wrong_lengths_of_a_sleep(self, seconds, kind, got):
        """`sleep` itself refuses what is no length of time, because each clock would treat it differently."""
        with pytest.raises(kind, match=rf"^sleep: expected a number of seconds from 0 up, got {got}$"):
            next(sleep(seconds))


class TestCompose:
    def test_nothing_is_send(self):
        """Without middleware there is only the innermost flow."""
        assert compose([]) is send

    def test_order(self):
        """The first middleware is outermost."""
        log = []

        def layer(name):
            def mw(request, call_next):
                log.append(name)
                return (yield from call_next(request))

            return mw

        effect = next(compose([layer("a"), layer("b")])(REQUEST))
        assert log == ["a", "b"]
        assert effect == Send(REQUEST)

    def test_what_the_innermost_passes_is_sent(self):
        """The request that a middleware passes on is the request of the effect."""

        def warm(request, call_next):
            return (yield from call_next(request.evolve(temperature=1.0)))

        assert next(compose([warm])(REQUEST)).request.temperature == 1.0

    def test_layer_name(self):
        """A function has its qualified name, an object the name of its class."""

        class Layer:
            def __call__(self, request, call_next):
                return (yield from call_next(request))

        assert layer_name(send) == "send"
        assert layer_name(Layer()).endswith("Layer")
        assert isinstance(Layer(), Middleware)


class TestSend:
    def test_a_whole_response(self):
        """The flow sends and returns the response; the record has model and usage."""
        request = Request(model="m", messages="hi")
        flow = send(request)
        assert next(flow) == Send(request)
        response = Response("ok", model="m-2", usage=Usage(input_tokens=1))
        assert finish(flow, response) is response
        assert (request.call.attempts, request.call.model) == (1, "m-2")
        assert request.call.usage == Usage(input_tokens=1)

    def test_a_str(self):
        """A str becomes a response."""
        flow = send(REQUEST)
        next(flow)
        assert finish(flow, "ok") == Response("ok")

    def test_a_stream(self):
        """Each chunk goes out, and the source holds the next chunk when the flow is resumed."""
        flow = send(REQUEST)
        next(flow)
        source = Source("a")
        assert flow.send(source) == Chunk("a")
        source.chunk = Chunk("b", finish_reason="stop")
        assert flow.send(None).text == "b"
        source.chunk = END
        assert finish(flow) == Response("ab", finish_reason="stop")

    def test_an_error_before_output(self):
        """The flow of a stream has it released, and raises the error unchanged."""
        error = ServerError("down")
        request = Request(model="m", messages="hi")
        request.call.streaming = True
        flow = send(request)
        next(flow).sent = True
        assert flow.throw(error) == Release(request)
        with pytest.raises(ServerError) as caught:
            next(flow)
        assert caught.value is error

    @pytest.mark.parametrize(
        ("chunk", "output"), [(Chunk("a"), True), (Chunk(reasoning="hm"), True), (Chunk(model="m-2"), False)]
    )
    def test_an_error_of_a_stream(self, chunk, output):
        """After output the error becomes an interruption with the partial response."""
        error = ServerError("down")
        request = Request(model="m", messages="hi")
        request.call.streaming = True
        flow = send(request)
        next(flow).sent = True
        flow.send(Source(chunk))
        assert flow.throw(error) == Release(request)
        with pytest.raises(StreamInterrupted if output else ServerError) as caught:
            next(flow)
        if output:
            assert caught.value.__cause__ is error
            assert caught.value.partial.text == chunk.text

    def test_an_interrupt_does_not_end_the_attempt(self):
        """A BaseException that is not an Exception passes at once, without an end of the attempt."""
        flow = send(REQUEST)
        next(flow)
        with pytest.raises(KeyboardInterrupt):
            flow.throw(KeyboardInterrupt())


class TestObservers:
    def test_an_attempt_is_begun_and_ended_once(self):
        """The request that is sent has the headers of all, those of the innermost first, and no observers."""
        outer, inner = Observing({"a": "outer", "b": "outer"}), Observing({"A": "inner"})
        request = observed(observed(Request(model="m", messages="hi", headers={"c": "own"}), outer), inner)
        flow = send(request)
        effect = next(flow)
        assert effect.request.headers == {"A": "inner", "b": "outer", "c": "own"}
        assert effect.request.observers == ()
        assert request.headers == {"c": "own"}
        effect.sent = True
        finish(flow, Response("ok"))
        assert outer.ends == inner.ends == [("ok", True)]
        assert [len(each.begun) for each in (outer, inner)] == [1, 1]

    @pytest.mark.parametrize("sent", [True, False])
    @pytest.mark.parametrize("error", [ServerError("down"), KeyboardInterrupt(), GeneratorExit()], ids=repr)
    def test_every_error_ends_an_attempt(self, error, sent):
        """So does the close of a flow, whether the provider was called or not."""
        watching = Observing()
        flow = send(observed(Request(model="m", messages="hi"), watching))
        next(flow).sent = sent
        with pytest.raises(type(error)):
            flow.throw(error)
        flow.close()
        assert watching.ends == [(type(error), sent)]
