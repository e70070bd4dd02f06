"""How the almanac's model is trained and examined. Using the almanac imports nothing from here."""
