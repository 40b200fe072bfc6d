"""What the test suite measures with: each tool has a test that shows it finding a planted fault."""
