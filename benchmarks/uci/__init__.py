"""The UCI regression table: mean-field networks beside published numbers."""
