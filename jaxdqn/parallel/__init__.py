"""Ways of running the one trainer in parallel: populations of members, and devices."""
