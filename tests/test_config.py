"""LLMConfig: ranges and types, all problems at once; YAML files with variables; keys that stay secret."""

from __future__ import annotations

import copy
import pickle
import traceback

import attrs
import pytest

from fluxibly import LLM, AsyncLLM, LLMConfig, register_middleware
from fluxibly.config import _MESSAGE_FIELDS, QUIRKS, Secret, Timeouts
from fluxibly.errors import ConfigError, FrameworkNotRegistered
from fluxibly.middleware import Logging
from fluxibly.providers.dialects.openai_request import Quirks
from fluxibly.providers.services import OWN_SERVER, SERVICES

KEY = "sk-very-secret-0123456789"


def config(**settings):
    return LLMConfig(**{"framework": "echo", "model": "m", **settings})


@pytest.fixture
def file(tmp_path):
    """A function that writes a text to a YAML file and returns its path: `file(text)`."""

    def write(text, **options):
        path = tmp_path / "framework.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


class TestValues:
    def test_defaults(self):
        """Request parameters default to None, which is not sent; the other defaults are as documented."""
        assert attrs.asdict(config()) == {
            "framework": "echo",
            "model": "m",
            "temperature": None,
            "max_tokens": None,
            "top_p": None,
            "top_k": None,
            "frequency_penalty": None,
            "presence_penalty": None,
            "stop": None,
            "seed": None,
            "n": None,
            "response_format": None,
            "reasoning_effort": None,
            "api_key": None,
            "api_base": None,
            "region": None,
            "project": None,
            "headers": {},
            "timeout": None,
            "max_retries": 3,
            "additional_params": {},
            "quirks": {},
            "middleware": None,
        }

    @pytest.mark.parametrize(
        ("name", "good", "bad", "range_"),
        [
            ("temperature", [0, 2, 0.7], [-0.1, 2.1, 3, "hot", True, float("nan")], "a number from 0 to 2"),
            ("top_p", [0, 1], [-0.1, 1.5, "x"], "a number from 0 to 1"),
            ("frequency_penalty", [-2, 2], [-2.5, 3, []], "a number from -2 to 2"),
            ("presence_penalty", [-2, 2], [-2.5, 3], "a number from -2 to 2"),
            ("max_tokens", [1, 10**6], [0, -1, 1.5, "many", True], "a whole number from 1 up"),
            ("max_retries", [0, 9], [-1, 1.5, "x", None], "a whole number from 0 up"),
            ("timeout", [0.1, 60, None, Timeouts()], [0, -1, "soon", float("inf")], "a number of seconds above 0"),
            ("framework", ["echo"], ["", " ", 5, None], "a non-empty str"),
            ("model", ["m"], ["", 5, None], "a non-empty str"),
            (
                "api_base",
                ["http://x", "HTTPS://x/v1"],
                ["x.com", "ftp://x", "http://", 5],
                "an http:// or https:// URL",
            ),
            ("additional_params", [{}, {"a": [1]}], [None, [], "x", {1: 2}], ""),
            ("quirks", [{}, {"top_k": True}], [None, [], "x", {1: 2}], "expected"),
            ("middleware", [[], ["logging"], ()], ["logging", {"retry": 1}, 5], "expected a list"),
            ("api_key", ["k", Secret("k"), None], [5, b"k"], "expected a str"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_ranges(self, name, good, bad, range_):
        """The error for a value out of range names the setting and the range."""
        for value in good:
            config(**{name: value})
        for value in bad:
            with pytest.raises(ConfigError) as caught:
                config(**{name: value})
            assert str(caught.value).startswith(f"{name}: ")
            assert range_ in str(caught.value)

    def test_all_problems_at_once(self):
        """A single error lists all problems, in its message and as `problems`."""
        with pytest.raises(ConfigError) as caught:
            config(temperature=3, max_tokens="many", top_p=2, timeout=-1)
        assert caught.value.problems == (
            "temperature: expected a number from 0 to 2, got 3",
            "max_tokens: expected a whole number from 1 up, got 'many'",
            "top_p: expected a number from 0 to 1, got 2",
            "timeout: expected a number of seconds above 0, got -1",
        )
        assert str(caught.value) == "several settings are wrong:\n" + "\n".join(f"- {p}" for p in caught.value.problems)
        assert isinstance(caught.value, ValueError)

    def test_a_huge_value_makes_no_huge_message(self):
        """The message shortens a huge value."""
        with pytest.raises(ConfigError) as caught:
            config(temperature="x" * 10_000_000, api_base="y" * 10_000_000)
        assert len(str(caught.value)) < 1000

    def test_a_missing_model(self):
        """Python's own error names the missing argument."""
        with pytest.raises(TypeError, match="'model'"):
            LLMConfig(framework="echo")

    def test_timeouts(self):
        """A number sets every limit; `Timeouts` sets each limit separately, and keeps the defaults of the others."""
        assert config(timeout=5).timeouts == Timeouts(5, 5, 5, 5)
        assert config().timeouts == Timeouts()
        times = config(timeout=Timeouts(connect=1, idle=None)).timeouts
        assert (times.connect, times.first_byte, times.idle, times.total) == (1, 600, None, 600)
        assert (Timeouts().connect, Timeouts().idle) == (10, 120)
        with pytest.raises(ConfigError) as caught:
            Timeouts(connect=0, idle="x", total=True)
        assert [problem.split(":")[0] for problem in caught.value.problems] == [
            "timeout.connect",
            "timeout.idle",
            "timeout.total",
        ]

    @pytest.mark.parametrize(
        ("timeout", "whole", "stream"),
        [
            (None, 600, None),
            (5, 5, None),
            (Timeouts(), 600, None),
            (Timeouts(idle=5), 600, None),
            (Timeouts(total=600), 600, 600),
            (Timeouts(total=None), None, None),
        ],
    )
    def test_only_a_total_that_is_given_limits_a_stream(self, timeout, whole, stream):
        """The total of a whole answer has a default, and may be the number. A stream's has to be given."""
        made = config(timeout=timeout)
        assert (made.timeouts.total, made.stream_total) == (whole, stream)

    def test_a_total_that_is_left_out(self):
        """It stays left out in copies, and differs from the same total, given."""
        times = Timeouts(idle=5)
        copies = [copy.copy(times), copy.deepcopy(times), pickle.loads(pickle.dumps(times)), attrs.evolve(times)]  # noqa: S301  # our own bytes
        for each in copies:
            assert (each, hash(each), each.stream_total) == (times, hash(times), None)
        assert attrs.evolve(times, connect=1) == Timeouts(connect=1, idle=5)
        assert attrs.evolve(times, total=7).stream_total == 7
        assert times != Timeouts(idle=5, total=600)
        assert repr(times) == "Timeouts(connect=10.0, first_byte=600.0, idle=5)"
        assert repr(Timeouts(total=None)) == "Timeouts(connect=10.0, first_byte=600.0, idle=120.0, total=None)"
        with pytest.raises(TypeError, match="Timeouts has no 'totl'; did you mean 'total'"):
            Timeouts(totl=5)

    def test_it_is_immutable(self):
        """A configuration cannot be changed through its fields or through the objects that it was made from."""
        params, layers = {"a": 1}, ["logging"]
        made = config(additional_params=params, middleware=layers)
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            made.model = "other"
        params["b"] = 2
        layers.append("retry")
        assert made.additional_params == {"a": 1}
        assert made.middleware == ["logging"]

    def test_it_can_be_pickled_and_copied(self):
        """A configuration can be pickled for worker processes, and copied; the key stays in it."""
        made = config(api_key=KEY, timeout=Timeouts(idle=3), additional_params={"a": 1})
        pickled = pickle.loads(pickle.dumps(made))  # noqa: S301  # the test's own bytes
        for again in (pickled, copy.deepcopy(made), attrs.evolve(made)):
            assert again == made
            assert again.api_key.reveal() == KEY


class TestQuirks:
    def test_they_are_the_dialects_own(self):
        """Every field of a dialect's quirks can be set, except for the path."""
        assert {*QUIRKS, "path"} == {field.name for field in attrs.fields(Quirks)}

    def test_the_vocabulary_is_the_dialects_own(self):
        """What a server takes back by default may be set by name."""
        assert QUIRKS["message_fields"]("x", Quirks().message_fields) is None
        assert set(_MESSAGE_FIELDS) == set(OWN_SERVER["message_fields"])
        for row in SERVICES.values():
            assert config(quirks={name: value for name, value in row.quirks.items() if name != "path"})

    @pytest.mark.parametrize(
        ("quirks", "problem"),
        [
            (
                {"reasoning_feilds": []},
                "quirks.reasoning_feilds: there is no such setting; did you mean 'reasoning_fields'?",
            ),
            ({"path": "/x"}, "quirks.path: there is no such setting"),
            (
                {"reasoning_fields": "reasoning"},
                "quirks.reasoning_fields: expected a list of names among reasoning_content, reasoning, got 'reasoning'",
            ),
            (
                {"reasoning_fields": ["thinking"]},
                "quirks.reasoning_fields: expected a list of names among reasoning_content, reasoning, got 'thinking'",
            ),
            ({"top_k": "yes"}, "quirks.top_k: expected true or false, got 'yes'"),
            ({"seed": ""}, "quirks.seed: expected a non-empty str, got ''"),
            (
                {"max_tokens": "tokens"},
                "quirks.max_tokens: expected one of 'max_tokens', 'max_completion_tokens', 'by model', got 'tokens'",
            ),
            ({"formats": ["xml"]}, "quirks.formats: expected a list of names among text, json, schema, got 'xml'"),
        ],
    )
    def test_wrong_quirks(self, quirks, problem):
        """The error names the quirk, and what it may be."""
        with pytest.raises(ConfigError) as caught:
            config(quirks=quirks)
        assert caught.value.problems == (problem,)

    def test_in_yaml(self, file):
        """Quirks are a table, and their problems are listed with the others."""
        made = LLMConfig.from_yaml(file("llm: {framework: echo, model: m, quirks: {reasoning_fields: [reasoning]}}"))
        assert made.quirks == {"reasoning_fields": ["reasoning"]}
        with pytest.raises(ConfigError) as caught:
            LLMConfig.from_yaml(file("llm: {framework: echo, model: m, top_p: 3, quirks: {topk: true, top_k: 1}}"))
        assert caught.value.problems == (
            "llm.top_p: expected a number from 0 to 1, got 3",
            "llm.quirks.topk: there is no such setting; did you mean 'top_k'?",
            "llm.quirks.top_k: expected true or false, got 1",
        )

    def test_another_framework_has_none(self):
        """Quirks of a framework that does not speak OpenAI's dialect would be ignored, so they are refused."""
        with pytest.raises(
            ConfigError, match="quirks: only OpenAI-compatible services take this setting, and 'echo' does not"
        ):
            LLM(config(quirks={"top_k": True}))


class TestSecret:
    def test_it_shows_itself_only_when_asked(self):
        """A key appears in no repr, str or format; only `reveal` returns it."""
        made = config(api_key=KEY)
        for text in (repr(made), str(made), f"{made}", f"{made.api_key}", f"{made.api_key!r}", f"{made.api_key}"):
            assert KEY not in text
        assert repr(made.api_key) == "Secret('***')"
        assert made.api_key.reveal() == KEY
        with pytest.raises(TypeError) as caught:
            format(made.api_key, "40")
        assert KEY not in str(caught.value)

    def test_it_is_in_no_error(self, file):
        """A key appears in no error, whatever else is wrong."""
        with pytest.raises(ConfigError) as caught:
            config(api_key=KEY, temperature=5, api_base="nowhere")
        assert KEY not in "".join(traceback.format_exception(caught.value))
        with pytest.raises(ConfigError) as caught:
            LLMConfig.from_yaml(file(f"llm:\n  api_key: {KEY}\n  modle: m"))
        assert KEY not in "".join(traceback.format_exception(caught.value))

    def test_equality(self):
        """A Secret equals the str that it holds, and a Secret with the same str."""
        assert Secret(KEY) == KEY
        assert Secret(KEY) == Secret(KEY)
        assert Secret(KEY) != "other"
        assert Secret(KEY) != 5
        assert hash(Secret(KEY)) == hash(KEY)
        assert not Secret("")
        with pytest.raises(TypeError, match="Secret: expected a str, got an int"):
            Secret(5)

    @pytest.mark.parametrize("login", ["me:hunter2", "hunter2", ":hunter2"])
    def test_a_password_in_an_address_is_not_shown(self, login):
        """`repr` hides the user name and the password in an address."""
        assert "hunter2" not in repr(config(api_base=f"http://{login}@host/v1"))
        assert "//***@host/v1" in repr(config(api_base=f"http://{login}@host/v1"))

    @pytest.mark.parametrize(
        "address",
        [
            "ftp://me:hunter2@host/v1",
            "http://me:hunter2@host:99999/v1",
            "http://me:a@hunter2@host/v1",
            "http://me:a/hunter2@host/v1",
            "http://me:a hunter2@host/v1",
            b"http://me:hunter2@host/v1",
        ],
    )
    def test_a_password_in_an_invalid_address_is_not_shown(self, address):
        """The error about an address hides the password in it, also one that makes the address invalid."""
        with pytest.raises(ConfigError, match=r"api_base: expected an http:// or https:// URL, got b?'.*//\*\*\*@host"):
            config(api_base=address)
        with pytest.raises(ConfigError) as caught:
            config(api_base=address)
        assert "hunter2" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("api_key", value) for value in (KEY.encode(), [KEY], {"a": KEY})),
            *(("headers", value) for value in (KEY, [KEY], {"a": [KEY]}, {"a": KEY.encode()})),
            *(("additional_params", value) for value in (KEY, [KEY])),
        ],
    )
    def test_a_key_of_the_wrong_type_is_not_shown(self, name, value):
        """A key that is given as something else than a str, or where a table belongs, is in no error."""
        with pytest.raises(ConfigError, match=f"{name}.*: expected a .*, got a") as caught:
            config(**{name: value})
        assert KEY not in str(caught.value)

    def test_the_caller_s_own_tables_stay_the_caller_s(self):
        """What the caller changes later in a table does not reach the configuration."""
        headers, parameters = {"x-gateway": "harbour"}, {"logit_bias": {}}
        made = config(headers=headers, additional_params=parameters)
        headers["x-gateway"] = parameters["added"] = "quay"
        assert made.headers == {"x-gateway": "harbour"}
        assert made.additional_params == {"logit_bias": {}}


class TestYaml:
    def test_a_key_among_the_additional_parameters(self):
        """`repr` hides the values of secrets among the additional parameters."""
        made = config(additional_params={"headers": {"Authorization": KEY}, "api_key": KEY, "logit_bias": {"1": 2}})
        assert KEY not in repr(made)
        assert "'logit_bias': {'1': 2}" in repr(made)
        assert made.additional_params["api_key"] == KEY

    @pytest.mark.parametrize(
        "name",
        [
            "api_key",
            "X-API-KEY",
            "access_token",
            "clientSecret",
            "Password",
            "credentials",
            "auth",
            "Cookie",
            "headers",
        ],
    )
    @pytest.mark.parametrize(
        "value", [KEY, KEY.encode(), [KEY], (KEY,), {"a": KEY}, {"a": [{"b": KEY}]}, [("x-gateway", KEY)]], ids=repr
    )
    def test_whatever_a_secret_is_called(self, name, value):
        """`repr` hides a secret by its name, in capitals too, with all that is in its table or list."""
        assert KEY not in repr(config(additional_params={name: value}))
        assert KEY not in repr(config(additional_params={"routes": [{name: value}], "others": ({name: value},)}))

    def test_what_is_no_secret_is_shown_as_it_is(self):
        """Lists, tuples and numbers stay what they are."""
        made = config(additional_params={"stop": ["a", ("b", 1)], "max_tokens_per_key": 5, "user": b"me"})
        assert "{'stop': ['a', ('b', 1)], 'max_tokens_per_key': 5, 'user': b'me'}" in repr(made)

    def test_a_file(self, file):
        """The section `llm:` is read, including nested tables and lists."""
        made = LLMConfig.from_yaml(
            file("""
llm:
  framework: echo
  model: m
  temperature: 0.2
  timeout: {connect: 5, idle: 30}
  additional_params: {top_k: 4, stop: [a, b], nested: {deep: [1, {x: y}]}}
  middleware: [logging, retry: {max_retries: 5}]
other: {ignored: true}
""")
        )
        assert made == LLMConfig(
            framework="echo",
            model="m",
            temperature=0.2,
            timeout=Timeouts(connect=5, idle=30),
            additional_params={"top_k": 4, "stop": ["a", "b"], "nested": {"deep": [1, {"x": "y"}]}},
            middleware=["logging", {"retry": {"max_retries": 5}}],
        )

    def test_another_section(self, file):
        """`section` names another section to read."""
        assert LLMConfig.from_yaml(file("small: {framework: echo, model: s}"), section="small").model == "s"

    def test_a_path_may_be_a_string(self, file):
        """The path may be a str, as in `LLM.from_yaml("config/framework.yaml")`."""
        assert LLM.from_yaml(str(file("llm: {framework: echo, model: m}"))).forward("Hello") == "Hello"

    def test_nothing_is_the_default(self, file):
        """A setting without a value, as `temperature:`, keeps its default."""
        assert LLMConfig.from_yaml(file("llm: {framework: echo, model: m, timeout: , top_p: null}")) == config()
        limits = "{idle: null, total: ~, connect: '${NOT_SET:-}'}"
        made = LLMConfig.from_yaml(file(f"llm: {{framework: echo, model: m, timeout: {limits}}}"))
        assert made.timeout == Timeouts(idle=None, total=None)  # null is no limit, and not the default

    def test_all_problems_with_their_paths(self, file):
        """A single error lists unknown settings with the nearest name, missing settings and wrong values."""
        with pytest.raises(ConfigError) as caught:
            LLMConfig.from_yaml(
                file("llm: {framework: echo, temprature: 1, top_p: 3, timeout: {conect: 1, idle: -1, total: x}, 5: x}")
            )
        assert caught.value.problems == (
            "llm.temprature: there is no such setting; did you mean 'temperature'?",
            (
                "llm.5: expected the name of a setting, got an int (in YAML, on, off, yes, no and numbers are no names "
                "unless they are in quotes)"
            ),
            "llm.model: is required",
            "llm.timeout.conect: there is no such setting; did you mean 'connect'?",
            "llm.timeout.idle: expected a number of seconds above 0, got -1",
            "llm.timeout.total: expected a number of seconds above 0, got 'x'",
            "llm.top_p: expected a number from 0 to 1, got 3",
        )

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "is empty; it needs a section `llm:` with framework and model"),
            ("# nothing\n", "is empty; it needs a section"),
            ("- llm", "expected a table with a section `llm:`, got a list"),
            ("llm", "expected a table with a section `llm:`, got a single value (str)"),
            ("lm: {}", "has no section `llm:`; did you mean 'lm'?"),
            ("llm: [a, b]", "`llm:`: expected a table with framework and model, got a list"),
            ("llm:", "`llm:`: expected a table with framework and model, got nothing"),
            ("llm: {a: [}", "line 1: not valid YAML: "),
            (
                "llm:\n\tmodel: m",
                "line 2: not valid YAML: found character '\\t' that cannot start any token; indent with spaces",
            ),
            (
                "llm: {framework: echo, model: m, model: n}",
                "line 1: not valid YAML: the key 'model' is given twice, here and in line 1",
            ),
            ("llm: !!python/object/apply:os.system [true]", "not valid YAML: could not determine a constructor"),
            ("llm: {model: 2024-13-45}", "put it in quotes"),
            ("llm: {model: !!bool perhaps}", "put it in quotes"),
            ("llm: \0", "not valid YAML: "),
            ("a: " + "[" * 10_000, "nested too deeply"),
            (b"llm: {model: caf\xe9}", "is not UTF-8 text"),
        ],
        ids=lambda value: repr(value)[:40],
    )
    def test_bad_files(self, file, text, problem):
        """The error is a single line that names the file and the problem."""
        path = file(text)
        with pytest.raises(ConfigError) as caught:
            LLMConfig.from_yaml(path)
        assert str(path) in str(caught.value)
        assert problem in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_files_that_cannot_be_read(self, tmp_path):
        """The error for a missing file, a folder or an impossible path names the reason."""
        with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.yaml: No such file or directory"):
            LLMConfig.from_yaml(tmp_path / "nowhere.yaml")
        with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
            LLMConfig.from_yaml(tmp_path)
        with pytest.raises(ConfigError, match=r"cannot read .*: embedded null byte"):
            LLMConfig.from_yaml("a\0b")

    def test_a_byte_order_mark(self, file):
        """A byte order mark, which Windows editors write, is skipped."""
        assert LLMConfig.from_yaml(file(b"\xef\xbb\xbfllm: {framework: echo, model: m}")) == config()

    def test_aliases_that_multiply(self, file):
        """A small file whose aliases make billions of values is read quickly."""
        lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30))]
        made = LLMConfig.from_yaml(
            file("\n".join([*lines, "llm: {framework: echo, model: m, additional_params: {b: *a29}}"]))
        )
        assert len(made.additional_params["b"]) == 10

    def test_a_configuration_that_is_not_a_mapping(self):
        """`from_mapping` refuses a value that is not a mapping."""
        with pytest.raises(ConfigError, match="the configuration: expected a mapping"):
            LLMConfig.from_mapping(["a"])


class TestVariables:
    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch):
        monkeypatch.setenv("SET", "value")
        monkeypatch.setenv("EMPTY", "")
        monkeypatch.setenv("NUMBER", "7")
        monkeypatch.setenv("NESTED", "${SET}")
        monkeypatch.delenv("UNSET", raising=False)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("${SET}", "value"),
            ("a-${SET}-${SET}-b", "a-value-value-b"),
            ("${SET:-other}", "value"),
            ("${UNSET:-other}", "other"),
            ("${EMPTY:-other}", "other"),
            ("x${EMPTY}", "x"),
            ("${UNSET:-}x", "x"),
            ("${UNSET:-http://a:1/b?c=d}", "http://a:1/b?c=d"),
            ("${NESTED}", "${SET}"),
            ("$SET {SET} $", "$SET {SET} $"),
        ],
    )
    def test_forms(self, file, text, value):
        """Variables and defaults are replaced, other text with `$` is not, and values are not expanded again."""
        made = LLMConfig.from_yaml(file(f"llm: {{framework: echo, model: '{text}'}}"))
        assert made.model == value

    def test_in_lists_and_tables(self, file):
        """Variables are replaced at any depth of a value, but not in keys."""
        made = LLMConfig.from_yaml(
            file("llm: {framework: echo, model: m, additional_params: {a: [x, {b: '${SET}'}], '${SET}': 1}}")
        )
        assert made.additional_params == {"a": ["x", {"b": "value"}], "${SET}": 1}

    def test_numbers(self, file):
        """A variable in a numeric setting is converted into a number."""
        made = LLMConfig.from_yaml(
            file(
                "llm: {framework: echo, model: m, temperature: '${UNSET:-0.5}', max_tokens: '${NUMBER}', "
                "max_retries: '${NUMBER}', timeout: {idle: '${NUMBER}'}}"
            )
        )
        assert (made.temperature, made.max_tokens, made.max_retries, made.timeout.idle) == (0.5, 7, 7, 7.0)
        with pytest.raises(ConfigError) as caught:
            LLMConfig.from_yaml(file("llm: {framework: echo, model: m, max_tokens: '${SET}', timeout: 'nan'}"))
        assert caught.value.problems == (
            "llm.max_tokens: expected a whole number from 1 up, got 'value'",
            "llm.timeout: expected a number of seconds above 0, got nan",
        )

    def test_an_empty_variable_is_not_given(self, file):
        """An optional setting with an empty variable keeps its default."""
        made = LLMConfig.from_yaml(
            file(
                "llm: {framework: echo, model: m, api_base: '${UNSET:-}', temperature: '${EMPTY}', api_key: '${EMPTY}'}"
            )
        )
        assert made == config()

    def test_unset_variables(self, file):
        """A single error lists all unset variables, each with its path."""
        with pytest.raises(ConfigError) as caught:
            LLMConfig.from_yaml(
                file("llm: {framework: '${UNSET}', middleware: [{retry: {max_retries: '${NOT_SET}'}}]}")
            )
        assert caught.value.problems == (
            "llm.framework: the environment variable UNSET is not set; set it, or write ${UNSET:-default}",
            (
                "llm.middleware[0].retry.max_retries: the environment variable NOT_SET is not set; "
                "set it, or write ${NOT_SET:-default}"
            ),
            "llm.model: is required",
        )

    @pytest.mark.parametrize("text", ["${}", "${SET", "${1X}", "${SET:?no}", "${UNSET:-${SET}}", "${A B}"])
    def test_other_forms_are_refused(self, file, text):
        """Other forms of `${…}` are refused rather than sent to a service unchanged."""
        with pytest.raises(ConfigError, match=r"expected \$\{VAR\} or \$\{VAR:-default\}, got "):
            LLMConfig.from_yaml(file(f"llm: {{framework: echo, model: '{text}'}}"))

    def test_the_key_from_the_environment(self, file, monkeypatch):
        """A key may come from an environment variable, and does not appear in the repr."""
        monkeypatch.setenv("MY_KEY", KEY)
        made = LLMConfig.from_yaml(file("llm: {framework: echo, model: m, api_key: '${MY_KEY}'}"))
        assert made.api_key == KEY
        assert KEY not in repr(made)


class TestAllAtOnce:
    """`LLM.from_yaml` tells all that is wrong with a file in one error."""

    WRONG = """
llm:
  framework: opnai
  model: '${UNSET}'
  temprature: 1
  on: true
  timeout: {idle: '${UNSET}', total: -1}
  top_p: 3
  top_p: 2
  quirks: {formats: ['${UNSET}', xml]}
  middleware:
    - logging
    - retry: {max_retry: 1, max_retries: '${UNSET}', base_delay: -1}
    - loging
    - '${UNSET}'
    - [retry]
    - retry: [max_retries]
"""

    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch):
        monkeypatch.delenv("UNSET", raising=False)

    @pytest.mark.parametrize("kind", [LLM, AsyncLLM])
    def test_everything(self, file, kind):
        """Settings, variables, repeated keys, framework and middleware: each problem once, with its whole path."""
        path = file(self.WRONG)
        with pytest.raises(FrameworkNotRegistered) as caught:
            kind.from_yaml(path)
        unset = "the environment variable UNSET is not set; set it, or write ${UNSET:-default}"
        found = [problem.partition(" Available ")[0] for problem in caught.value.problems]
        assert found == [
            f"{path}, line 9: not valid YAML: the key 'top_p' is given twice, here and in line 8",
            f"llm.model: {unset}",
            f"llm.timeout.idle: {unset}",
            f"llm.quirks.formats[0]: {unset}",
            f"llm.middleware[1].retry.max_retries: {unset}",
            f"llm.middleware[3]: {unset}",
            "llm.temprature: there is no such setting; did you mean 'temperature'?",
            (
                "llm.True: expected the name of a setting, got a bool (in YAML, on, off, yes, no and numbers are no "
                "names unless they are in quotes)"
            ),
            "llm.timeout.total: expected a number of seconds above 0, got -1",
            "llm.top_p: expected a number from 0 to 1, got 2",
            "llm.quirks.formats: expected a list of names among text, json, schema, got '${UNSET}'",
            "llm.framework: did you mean 'openai'? LLM framework 'opnai' not registered.",
            "llm.middleware[1].retry.max_retry: there is no such setting; did you mean 'max_retries'?",
            "llm.middleware[1].retry.base_delay: expected a number from 0 up, got -1",
            "llm.middleware[2]: middleware 'loging' not registered; did you mean 'logging'?",
            "llm.middleware[4]: expected the name of a middleware or a table of one name, got a list",
            "llm.middleware[5].retry: expected a table of settings, e.g. - retry: {max_retries: …}",
        ]

    def test_the_middleware_alone(self, file):
        """A configuration is read before a program registers its middleware; what makes the model tells all."""
        path = file("small: {framework: echo, model: m, middleware: [mine, {retry: {max_retry: 1}}]}")
        assert LLMConfig.from_yaml(path, section="small").middleware == ["mine", {"retry": {"max_retry": 1}}]
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(path, section="small")
        assert [problem.partition(":")[0] for problem in caught.value.problems] == [
            "small.middleware[0]",
            "small.middleware[1].retry.max_retry",
        ]
        assert LLM.from_yaml(path, section="small", middleware=[]).forward("hi") == "hi"

    def test_a_table_of_middleware(self, file):
        """A table where the list of middleware should stand is one problem among the others."""
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(file("llm: {framework: echo, model: m, top_p: 3, middleware: {retry: {max_retries: 5}}}"))
        assert caught.value.problems == (
            "llm.top_p: expected a number from 0 to 1, got 3",
            "llm.middleware: expected a list, got a dict",
        )

    def test_quirks_of_another_framework(self, file):
        """Quirks that do not apply are told with their path, beside the others."""
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(file("llm: {framework: echo, model: m, quirks: {top_k: true}, middleware: [loging]}"))
        assert [problem.partition(":")[0] for problem in caught.value.problems] == [
            "llm.quirks",
            "llm.middleware[0]",
        ]

    def test_a_key_is_in_no_problem(self, file):
        """Neither a key beside the problems nor one in a wrong place is quoted."""
        with pytest.raises(ConfigError) as caught:
            LLM.from_yaml(file(f"llm: {{framework: nowhere, api_key: {KEY}, additional_params: {KEY}}}"))
        assert KEY not in "".join(traceback.format_exception(caught.value))

    def test_a_file_that_is_right(self, file):
        """The middleware of a file are made once."""
        made = []

        def counted(**settings):
            made.append(settings)
            return Logging()

        register_middleware("counted", counted, replace=True)
        llm = LLM.from_yaml(file("llm: {framework: echo, model: m, middleware: [counted: {a: 1}]}"))
        assert llm.config.middleware == [{"counted": {"a": 1}}]
        assert made == [{"a": 1}]


class TestPlaces:
    def test_a_project_may_be_a_number(self):
        """YAML reads a project's number as a number."""
        made = LLMConfig.from_mapping({"framework": "vertex", "model": "m", "project": 123456, "region": "us"})
        assert (made.project, made.region) == ("123456", "us")

    @pytest.mark.parametrize(("name", "value"), [("project", True), ("region", 1), ("region", ["us"]), ("project", "")])
    def test_other_kinds(self, name, value):
        """A place is a non-empty str."""
        with pytest.raises(ConfigError, match=f"{name}: expected a non-empty str"):
            LLMConfig(framework="vertex", model="m", **{name: value})

    def test_the_word_of_other_libraries(self):
        """Google's clients call the region a location."""
        with pytest.raises(TypeError, match="did you mean 'region'"):
            LLMConfig(framework="vertex", model="m", location="us")
        with pytest.raises(ConfigError, match="location: there is no such setting; did you mean 'region'"):
            LLMConfig.from_mapping({"framework": "vertex", "model": "m", "location": "us"})
