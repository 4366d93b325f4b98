"""Pyro: sites, guide, lift, exact divergences and the param store."""
