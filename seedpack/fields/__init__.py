"""Images as coefficients: a pyramid of grids and a small network whose weights are pseudorandom bases."""
