"""How numbers are coded, as pure functions on arrays; nothing here knows a graph."""
