"""The stages of a build, one module each.

A stage is repeated only if something that its result depends on has changed; its key holds all of that.
"""
