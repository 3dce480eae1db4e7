"""The stages of a build, one module each.

A stage is made once, and again only when something its result depends on has changed; its key holds all of that.
"""
