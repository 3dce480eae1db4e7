"""What turns DINOv2's tokens into answers: the released heads, Depth Anything V2, and classifiers a user has fitted.

`kinds` says which heads there are and what each reads and gives; `reference` is the plain formulation that judges,
`graph` and `fold` are what is traced; `model` joins a backbone and a head to one graph.
"""
