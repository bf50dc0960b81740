"""The command `rlhf`: it runs the recipes, writes a project, and lists options."""
