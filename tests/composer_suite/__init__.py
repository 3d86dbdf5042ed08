"""Composer's own tests against polyak, given a checkout of its repository; none of its files is part of this one."""
