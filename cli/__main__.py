"""Run the program: python -m seedpack.cli."""

from seedpack.cli.main import main

main()
