"""Tables instead of networks: MDPs as arrays, value iteration, and Q-learning plain, state-partitioned, distributed."""
