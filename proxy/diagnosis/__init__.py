"""What can be told of an installation from outside, whether or not nearhit runs. Nothing is changed."""
