"""How information flows: kernels of one layer, what one pass keeps, hops, drawings of routes."""
