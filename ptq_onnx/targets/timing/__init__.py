"""How fast model files run, side by side, in the runtime they are meant for."""
