"""A report of a packed model as one page of HTML, which loads nothing from anywhere."""
