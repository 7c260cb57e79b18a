"""One room a stage; `table.py` lists them in order.

The table is not here because importing one stage must not import all the others.
"""
