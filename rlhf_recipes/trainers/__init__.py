"""PPO, reward modelling and SFT, as overrides of TRL's trainers."""
