"""Layers that stand in the place of a linear layer and hold its weight in fewer bits, one module per format.

Each is called as `bagel.modeling.linear.Linear` is, gives the weight that it multiplies by with `dense`, and says with
`exact` whether that is what was loaded. `quantize` puts them into a model.
"""
