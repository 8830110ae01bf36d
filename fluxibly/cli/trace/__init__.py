"""`fluxibly trace`: a file of spans (`file.py`) as a waterfall in the terminal (`terminal.py`) or a page (`html.py`).

`plot.py` draws time axes and arrivals for the page; `page.css` is its style. Only `cli` imports this package.
"""
