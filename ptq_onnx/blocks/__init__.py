"""What the nodes of a transformer are for: blocks, roles, sites, channels, selectors."""
