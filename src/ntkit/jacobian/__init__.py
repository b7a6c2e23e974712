"""The engine: gradients of every sample, read off the autograd graph in factored form and contracted.

``graph`` finds where parameters are used, ``rules`` turns each use into factors, ``factors`` runs a batch, ``check``
compares a few samples with plain autograd before the first result and lets ``ownership`` find out which sample a row
belongs to, ``contract`` plans and multiplies, ``operator`` is matrix-free, and ``reference`` is the slow oracle that
all of it must equal.
"""
