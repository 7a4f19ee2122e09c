"""Accidents and bad input tried in bulk, by hand: python -m tests.campaign.NAME; see README.md beside this file."""
