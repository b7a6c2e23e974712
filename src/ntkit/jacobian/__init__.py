"""The engine: gradients of every sample, read off the autograd graph in factored form and contracted.

``graph`` finds where parameters are used, ``rules`` turns each use into factors, ``ownership`` establishes which sample
a row belongs to, ``factors`` runs a batch, ``contract`` plans and multiplies, ``operator`` is matrix-free, and
``reference`` is the slow oracle that all of it must equal.
"""
