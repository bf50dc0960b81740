"""Limits between good, doubtful and bad reward models. The verdict after training and PPO's preflight read these."""

# A coin ranks half of the pairs right.
CHANCE = 0.5
# People agree with each other on 63 % (Bai et al. 2022, arXiv:2204.05862) to 73 % (Ouyang et al. 2022,
# arXiv:2203.02155) of such pairs. A model clearly below that has learned little of what they prefer.
GOOD_ACCURACY = 0.6
# Expected calibration error, beyond what chance makes. At 0.1, a predicted 70 % is 60 % or 80 %. At 0.2, it may be a
# coin.
CALIBRATED, MISCALIBRATED = 0.1, 0.2
# Correlation of score and length. Its square is the share of the variance that length explains: 9 %, and a quarter.
LITTLE_LENGTH, MUCH_LENGTH = 0.3, 0.5
