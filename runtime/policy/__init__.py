"""How precisions are chosen: the interface of a policy, features, budget, chooser."""
