"""Machines from EC2: bought by CreateFleet, watched by SQS and IMDSv2, known again by their tags.

boto3 (`pip install sanderling[aws]`) is imported when the first call is made, and nowhere else.
"""
