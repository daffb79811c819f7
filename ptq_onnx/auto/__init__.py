"""``--auto``: the fewest modules in float that keep the loss within a bound."""
