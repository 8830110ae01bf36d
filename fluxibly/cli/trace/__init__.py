"""`fluxibly trace`: a file of spans (`file.py`) as a waterfall in the terminal (`terminal.py`) or a page (`html.py`).

Both views show the facts of `facts.py`, the waits of a stream (`waits.py`) and the messages of calls (`conversation.py`). The
page has a table of calls (`table.py`) and a card for each trace (`card.py`) with plots (`plot.py`); `page.css` is its style and
`page.js` its script. Only `cli` imports this package.
"""
