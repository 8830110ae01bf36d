"""The description of a stack: its layers as a tree, the worst case, and warnings of orders that hurt."""
