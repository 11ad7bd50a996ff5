"""Run the program: python -m seedpack."""

from seedpack.cli.main import main

main()
