"""How far rounding alone takes two honest computations of one tensor apart."""

# How many yardsticks apart two honest computations of one tensor may be (spec). If both roundings are as long, each of sixteen
# or more independent errors, one is over four times the other less than once in a million (the F distribution of squares).
YARDSTICKS = 4
FLOAT32_ULP = 2.0**-23
# If the signs of the differences are independent, their sum is more than eight of its standard deviations from zero once
# in 10^13 tensors, whatever the magnitudes (Hoeffding: 2 exp(-8^2 / 2)). Sums added in another order move all elements of
# a row alike, by a few ulps of float32.
DEVIATIONS = 8
LEAST_FACTOR = 8 * FLOAT32_ULP
# The median of the magnitude of a normal variable, in standard deviations.
NORMAL_MEDIAN = 0.6745
