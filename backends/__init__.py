"""Where a model's text comes from: an engine in this process, or another server.

base.py says what a route knows of either; local.py and external.py are the two.
"""
