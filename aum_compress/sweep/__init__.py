"""Many trials of one recipe, on one machine or several, and the models among them that no other one beats."""
