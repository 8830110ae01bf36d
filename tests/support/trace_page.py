"""A parser of the page that `fluxibly trace --html` writes."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """A parser that checks that tags close in order, and collects what a page shows, links to and would fetch."""

    VOID = frozenset({"meta", "img", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.script = ""
        self.tags: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert self.open == ["html"] or not self.open
        assert len(set(self.ids)) == len(self.ids)
        assert {link.removeprefix("#") for link in self.links} <= set(self.ids)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.elements.append((tag, dict(attrs)))
        for name, value in attrs:
            if name in ("src", "href") and value:
                (self.links if value.startswith("#") else self.fetched).append(value)
            assert not name.startswith("on")
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.script += data
        elif self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag, **wanted):
        """Return the attributes of all elements with this name and these attributes."""
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]
