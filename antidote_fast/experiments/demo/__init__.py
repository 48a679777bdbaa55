"""The demo: a small real model, its data, and the road from it to a repaired one."""
