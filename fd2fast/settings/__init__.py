"""Settings: what may be set, named sets, paths, bounds, and the recipe of one distillation with nothing left open."""
