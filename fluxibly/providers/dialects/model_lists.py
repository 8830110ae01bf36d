"""The lists of models that services offer: where each is, and how its pages read.

A `ModelList` is data, and does no I/O: it makes the URL of a page and reads the page's body. A service may have several
lists (`Service.lists`); Bedrock's models and its inference profiles are two.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

import attrs

from fluxibly.errors import StreamProtocolError
from fluxibly.providers.dialects.errors import error_of_payload
from fluxibly.providers.dialects.json_values import as_array, as_object, as_text, read_json

# A server can fill memory only up to these limits.
MAX_PAGE: Final = 8 * 1024 * 1024
"""Maximum size of a page, in bytes. OpenRouter's only page has hundreds of models with their descriptions."""
MAX_PAGES: Final = 50
"""Maximum number of pages of a list."""
MAX_MODELS: Final = 20_000
"""Maximum number of models of a list."""
MAX_NAME: Final = 300
"""Maximum length of a model's name, in characters. A longer name is left out."""
MAX_CURSOR: Final = 4_000
"""Maximum length of the mark of the next page, in characters."""


class Page(NamedTuple):
    """A page of a list: the names of its models, and the mark of the next page; "" at the end."""

    models: list[str]
    cursor: str


@attrs.frozen(kw_only=True)
class ModelList:
    """A list of models, which a service gives in pages of JSON."""

    path: str = "/models"
    """The path and the query below the service's address."""
    moved: tuple[str, str] = ("", "")
    """A regular expression for the part of that address that differs for the list, and what takes its place."""
    models: str = "data"
    """The field of a page with the models. A page may also be the bare list."""
    name: str = "id"
    """The field of a model with its name."""
    after: str = ""
    """The part of a name up to which it is left out ("models/")."""
    only: tuple[str, str] = ("", "")
    """A field of a model that holds a list, and the value that must be in it, if the field is there."""
    next: str = ""
    """The field of a page with the mark of the next page."""
    cursor: str = ""
    """The parameter of the query that takes this mark."""

    def url(self, address: str, cursor: str = "") -> str:
        """Return the URL of the page at a mark, at first "", for a service at an address."""
        base = urlsplit(address)
        place = urlunsplit(base._replace(query="", fragment="")).rstrip("/")
        if self.moved[0]:
            place = re.sub(*self.moved, place, count=1)
        path, _, query = self.path.partition("?")
        queries = [base.query, query, f"{self.cursor}={quote(cursor, safe='')}" if cursor else ""]
        query = "&".join(filter(None, queries))
        return f"{place}{path}?{query}" if query else f"{place}{path}"

    def read(self, body: bytes) -> Page:
        """Read the body of a page.

        Raises:
            ProviderError: the body reports an error.
            StreamProtocolError: it is no page of this list.
        """
        payload: Any = read_json(body)
        page = as_object(payload)
        found: Any = payload
        if page or payload == {}:
            # Google leaves an empty list out.
            found = page.get(self.models, [] if page.keys() <= {self.next} else payload) or []
        if not isinstance(found, list):
            raise error_of_payload(payload, body=body) or StreamProtocolError(
                f"expected a list of models in the field {self.models!r}, got JSON without it: check api_base",
                retryable=False,
            )
        names = [self._name(as_object(model)) for model in as_array(found)]
        more = page.get("has_more") is not False  # Anthropic's last page has a mark too
        cursor = as_text(page.get(self.next)) if self.next and more else ""
        if len(cursor) > MAX_CURSOR:
            raise StreamProtocolError(
                f"expected a mark of the next page of at most {MAX_CURSOR:,} characters, got more", retryable=False
            )
        return Page([name for name in names if 0 < len(name) <= MAX_NAME], cursor)

    def _name(self, model: dict[str, Any]) -> str:
        """Return a model's name, or "" for one that cannot be called."""
        field, value = self.only
        if field in model and value not in as_array(model[field]):
            return ""
        name = as_text(model.get(self.name))
        return name.rpartition(self.after)[2] if self.after else name


OPENAI: Final = (ModelList(),)
AZURE: Final = (
    ModelList(path="/openai/deployments?api-version=2023-03-15-preview", moved=(r"(?<!/)/openai(/.*)?$", "")),
)
"""The deployments, whose names a call takes. No later version has this list: its `models` are those that could be deployed."""
ANTHROPIC: Final = (ModelList(path="/models?limit=1000", next="last_id", cursor="after_id"),)
GEMINI: Final = (
    ModelList(
        path="/models?pageSize=1000",
        models="models",
        name="name",
        after="models/",
        only=("supportedGenerationMethods", "generateContent"),
        next="nextPageToken",
        cursor="pageToken",
    ),
)
VERTEX: Final = tuple(
    ModelList(
        path=f"/v1beta1/publishers/{publisher}/models?pageSize=100",
        moved=(r"/v\d+\w*$", ""),
        models="publisherModels",
        name="name",
        after="/models/",
        next="nextPageToken",
        cursor="pageToken",
    )
    for publisher in ("google", "anthropic")
)
OLLAMA: Final = (ModelList(path="/api/tags", models="models", name="name"),)
COHERE: Final = (
    ModelList(
        path="/models?endpoint=chat&page_size=1000",
        moved=(r"/v2$", "/v1"),
        models="models",
        name="name",
        next="next_page_token",
        cursor="page_token",
    ),
)
_CONTROL: Final = (r"//bedrock-runtime\b", "//bedrock")
BEDROCK: Final = (
    ModelList(
        path="/foundation-models?byInferenceType=ON_DEMAND&byOutputModality=TEXT",
        moved=_CONTROL,
        models="modelSummaries",
        name="modelId",
    ),
    ModelList(
        path="/inference-profiles?maxResults=1000",
        moved=_CONTROL,
        models="inferenceProfileSummaries",
        name="inferenceProfileId",
        next="nextToken",
        cursor="nextToken",
    ),
)
"""The models that can be called by their own names, and the profiles by whose names the others are called."""
