"""Counts in Redis, which all replicas share. Needs what requirements-ray.txt installs."""

import secrets
from typing import Any

from redis import RedisError
from redis.asyncio import Redis

from serving import counts
from serving.counts import Count, Counts, StorageError

# A window is a hash with its count and its name. It ends by Redis's own clock, and should that be
# set back, no later than a whole window after it is next asked for.
ADD = """
local key, amount, limit = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local window_ms = tonumber(ARGV[3])
local counted = tonumber(redis.call('HGET', key, 'amount') or 0)
local is_within = 1
if counted + amount > limit then
  is_within = 0
elseif amount > 0 then
  counted = redis.call('HINCRBY', key, 'amount', amount)
  redis.call('HSETNX', key, 'name', ARGV[4])
end
local left_ms = redis.call('PTTL', key)
if left_ms == -1 or left_ms > window_ms then
  redis.call('PEXPIRE', key, window_ms)
end
if left_ms < 0 or left_ms > window_ms then
  left_ms = window_ms
end
return {is_within, counted, left_ms, redis.call('HGET', key, 'name') or ''}
"""
GIVE_BACK = """
if redis.call('HGET', KEYS[1], 'name') == ARGV[2] then
  redis.call('HINCRBY', KEYS[1], 'amount', -ARGV[1])
end
"""


class RedisCounts(Counts):
    """Counts that all replicas share. A connection is made with the first of them."""

    def __init__(self, address: str):
        try:
            self.redis = Redis.from_url(address, decode_responses=True)
        except ValueError:  # whose text may repeat the address, password and all
            raise ValueError("is no address of a Redis server") from None
        self._add = self.redis.register_script(ADD)
        self._give_back = self.redis.register_script(GIVE_BACK)

    async def add(self, key: str, amount: int, limit: int) -> Count:
        new_name = secrets.token_hex(8)
        arguments = [amount, limit, counts.WINDOW_SECONDS * 1000, new_name]
        is_within, counted, left_ms, name = await self._run(self._add, key, arguments)
        return Count(bool(is_within), counted, left_ms / 1000, name)

    async def give_back(self, key: str, amount: int, window: str) -> None:
        await self._run(self._give_back, key, [amount, window])

    async def _run(self, script: Any, key: str, arguments: list[Any]) -> Any:
        try:
            return await script([f"limits/{key}"], arguments)
        except (RedisError, OSError) as error:
            raise StorageError(str(error)) from error
