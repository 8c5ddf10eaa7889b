"""The command line, the side-by-side comparison of dense and zipvl, and the bundled model."""
