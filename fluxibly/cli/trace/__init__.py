"""`fluxibly trace`: a file of spans, read (`file.py`), as a waterfall in the terminal or as a page (`html.py`).

`plot.py` draws time axes and arrivals for the page, `page.css` is its style. Imported by `cli` alone.
"""
