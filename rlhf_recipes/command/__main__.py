"""`python -m rlhf_recipes.command` is `rlhf`, where the scripts of the environment are not on the path."""

from rlhf_recipes.command.main import main

if __name__ == "__main__":
    main()
