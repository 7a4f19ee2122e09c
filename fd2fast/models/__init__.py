"""Teachers and students: backbones, the CAL head, prototypes."""
