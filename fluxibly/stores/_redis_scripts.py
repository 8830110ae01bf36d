"""The Lua scripts of `RedisStore`. Each is one atomic step; they need no command that is newer than Redis 5.

Times are those of the server's clock, in microseconds: of today, a float has them to a quarter of one. Numbers are kept and
answered as text with 17 digits, because Redis would cut the fraction of a number off.

A queue is two sorted sets. `queue` has the order of arrival, and `seen` until when a waiter has to ask again; a waiter that
has not is forgotten. Every key expires once nothing depends on it.
"""

from __future__ import annotations

from hashlib import sha1


class Script:
    """A script, and the name by which a server that has seen it knows it."""

    def __init__(self, text: str) -> None:
        self.text = _COMMON + text
        self.sha = sha1(self.text.encode(), usedforsecurity=False).hexdigest()


_COMMON = """
local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function exact(number)
  return string.format('%.17g', number)
end

-- Let keys live for so many microseconds more, at least.
local function keep(us, ...)
  local ms = math.max(1, math.min(math.ceil(us / 1000) + 1, 1e13))
  for _, key in ipairs({...}) do
    if redis.call('PTTL', key) < ms then redis.call('PEXPIRE', key, exact(ms)) end
  end
end

-- Forget those who have not asked again in time, and return how many wait.
local function count_waiting(now, queue, seen, costs)
  local count = redis.call('ZCARD', queue)
  if count ~= redis.call('ZCARD', seen) then -- the server was out of memory, and has evicted one of both
    redis.call('DEL', queue, seen)
    return 0
  end
  if count == 0 then return 0 end
  local gone = redis.call('ZRANGEBYSCORE', seen, '-inf', exact(now))
  for _, who in ipairs(gone) do
    redis.call('ZREM', queue, who)
    redis.call('ZREM', seen, who)
    if costs then redis.call('HDEL', costs, who) end
  end
  return count - #gone
end

-- Let a caller wait behind all others, unless it waits already, and ask again within some time.
local function wait_in(queue, seen, who, place, now, us)
  if not place then
    local last = redis.call('ZREVRANGE', queue, 0, 0, 'WITHSCORES')[2] or 0
    redis.call('ZADD', queue, exact(last + 1), who)
  end
  redis.call('ZADD', seen, exact(now + us), who)
end
"""

_LIMIT = """
-- Return when a limit would be unused if nothing more were taken, how many microseconds a unit takes now (`usual`, or more
-- under a ceiling), and when its ceiling ends, or nil.
local function find_limit(key, name, usual, now)
  local found = redis.call('HMGET', key, 'at ' .. name, 'rate ' .. name, 'till ' .. name)
  local at, rate, till = tonumber(found[1]) or now, tonumber(found[2]), tonumber(found[3])
  if not rate then return at, usual end
  local slow = math.max(usual, 1e6 / rate)
  if now < till then return at, slow, till end
  redis.call('HDEL', key, 'rate ' .. name, 'till ' .. name)
  if at > till then -- what is taken stays taken, and drains faster from then on
    at = till + (at - till) * usual / slow
    redis.call('HSET', key, 'at ' .. name, exact(at))
  end
  return at, usual
end

local function keep_limit(key, name, usual, at, now)
  redis.call('HMSET', key, 'at ' .. name, exact(at), 'usual ' .. name, exact(usual))
  keep(at - now, key)
end
"""

# KEYS: limits, queue, seen, costs. ARGV: who, grace (us); for each limit: name, rate (units a second), burst, cost.
# Answers nil if the call may go, else how long it waits (us), and how many wait before it.
RESERVE = Script(
    _LIMIT
    + """
local key, queue, seen, costs = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local who, now = ARGV[1], clock()
local ahead, place = count_waiting(now, queue, seen, costs), false
if ahead > 0 then
  place = redis.call('ZRANK', queue, who)
  ahead = place or ahead
end

local before = {} -- what those ahead need of each limit: past the first 50, as much as these on average
if ahead > 0 then
  local first = redis.call('ZRANGE', queue, 0, math.min(ahead, 50) - 1)
  for _, packed in ipairs(redis.call('HMGET', costs, unpack(first))) do
    for name, cost in pairs(packed and cmsgpack.unpack(packed) or {}) do
      before[name] = (before[name] or 0) + cost * ahead / #first
    end
  end
end

local closed = tonumber(redis.call('HGET', key, 'closed')) or now
local wait, limits, mine = closed - now, {}, {}
for i = 3, #ARGV, 4 do
  local name, usual, burst, cost = ARGV[i], 1e6 / ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  local at, gap, till = find_limit(key, name, usual, now)
  at = math.max(at, now)
  local units = (at - now) / gap + (before[name] or 0)
  local room = burst
  if till then room = math.max(burst * usual / gap, math.min(cost, burst)) end -- what a burst takes at the usual rate
  local needed = (units + cost - room) * gap
  if till and needed > till - now then
    local left = till - now
    needed = left + math.max(0, (units - left / gap + cost - burst) * usual)
  end
  if ahead > 0 then needed = needed + math.max(0, closed - at) end
  wait = math.max(wait, needed)
  limits[#limits + 1] = {name, usual, at + cost * gap}
  mine[name] = cost
end

if ahead > 0 or wait >= 1 then -- less is a rounding error
  wait = math.max(wait, 0)
  if not place then redis.call('HSET', costs, who, cmsgpack.pack(mine)) end
  wait_in(queue, seen, who, place, now, wait + ARGV[2])
  keep(wait + ARGV[2], queue, seen, costs)
  return {exact(wait), ahead}
end
if place then
  redis.call('ZREM', queue, who)
  redis.call('ZREM', seen, who)
  redis.call('HDEL', costs, who)
end
for _, limit in ipairs(limits) do
  keep_limit(key, limit[1], limit[2], limit[3], now)
end
return nil
"""
)

# KEYS: limits. ARGV: name, rate, and what is taken more, or given back if it is negative.
CORRECT = Script(
    _LIMIT
    + """
local now, name, usual = clock(), ARGV[1], 1e6 / ARGV[2]
local at, gap = find_limit(KEYS[1], name, usual, now)
keep_limit(KEYS[1], name, usual, math.max(at, now) + ARGV[3] * gap, now)
"""
)

# KEYS: limits. ARGV: for how long (us). Nothing passes meanwhile.
CLOSE = Script("""
local now = clock()
local closed = math.max(tonumber(redis.call('HGET', KEYS[1], 'closed')) or now, now + ARGV[1])
redis.call('HSET', KEYS[1], 'closed', exact(closed))
keep(closed - now, KEYS[1])
""")

# KEYS: limits. ARGV: name, the highest rate, for how long (us). What is taken stays taken: it now drains at that rate.
SLOW_DOWN = Script(
    _LIMIT
    + """
local key, name, now = KEYS[1], ARGV[1], clock()
local usual = tonumber(redis.call('HGET', key, 'usual ' .. name))
if usual then
  local at, gap = find_limit(key, name, usual, now)
  if at > now then
    at = now + (at - now) * math.max(usual, 1e6 / ARGV[2]) / gap
    redis.call('HSET', key, 'at ' .. name, exact(at))
    keep(at - now, key)
  end
end
redis.call('HMSET', key, 'rate ' .. name, ARGV[2], 'till ' .. name, exact(now + ARGV[3]))
keep(tonumber(ARGV[3]), key)
"""
)

# KEYS: held, queue, seen. ARGV: who, how many places there are, for how long one is held (us), grace (us), whether to wait.
# Answers nil if the call has a place, else how many wait before it.
LEASE = Script("""
local held, queue, seen = KEYS[1], KEYS[2], KEYS[3]
local who, now = ARGV[1], clock()
redis.call('ZREMRANGEBYSCORE', held, '-inf', exact(now))
if redis.call('ZSCORE', held, who) then return nil end
local ahead, place = count_waiting(now, queue, seen), false
if ahead > 0 then
  place = redis.call('ZRANK', queue, who)
  ahead = place or ahead
end
if ahead > 0 or redis.call('ZCARD', held) >= tonumber(ARGV[2]) then
  if ARGV[5] == '1' then
    wait_in(queue, seen, who, place, now, tonumber(ARGV[4]))
    keep(tonumber(ARGV[4]), queue, seen)
  end
  return ahead
end
if place then
  redis.call('ZREM', queue, who)
  redis.call('ZREM', seen, who)
end
redis.call('ZADD', held, exact(now + ARGV[3]), who)
keep(tonumber(ARGV[3]), held)
return nil
""")

# KEYS: held. ARGV: who, for how long from now on (us). Answers whether the place was still held.
RENEW = Script("""
local now = clock()
local till = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]))
if not till or till <= now then return 0 end
redis.call('ZADD', KEYS[1], exact(now + ARGV[2]), ARGV[1])
keep(tonumber(ARGV[2]), KEYS[1])
return 1
""")

# KEYS: held; queue and seen of the places; queue, seen and costs of the limits. ARGV: who.
RELEASE = Script("""
for i = 1, 5 do
  redis.call('ZREM', KEYS[i], ARGV[1])
end
redis.call('HDEL', KEYS[6], ARGV[1])
""")

# KEYS: the sum, and a list of its parts: when each was added, and how much. ARGV: amount; the most, or nothing; for how long a
# part counts, and how long it gets more (both us, or nothing); for how long the sum lives without that (us).
# Answers the sum, or nil if it would exceed the most.
ADD = Script("""
local total_key, parts, now = KEYS[1], KEYS[2], clock()
local amount, most, per = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local total = tonumber(redis.call('GET', total_key)) or 0

local function part(index)
  local found = redis.call('LINDEX', parts, index)
  if not found then return nil end
  local at, size = string.match(found, '(%S+) (%S+)')
  return tonumber(at), tonumber(size)
end

local function written(at, size)
  return exact(at) .. ' ' .. exact(size)
end

local at, size = part(0)
local had_parts = at
while per and at and at <= now - per do
  redis.call('LPOP', parts)
  total = total - size
  at, size = part(0)
end
if had_parts and not at then total = 0 end -- without the rounding errors of what was added and taken away

local refused = amount >= 0 and most and total + amount > most
if amount < 0 then
  total = math.max(0, total + amount)
  local left = -amount -- it is taken off the oldest parts, which are forgotten first
  while at and left > 0 do
    redis.call('LPOP', parts)
    if size > left then redis.call('LPUSH', parts, written(at, size - left)) end
    left = left - size
    at, size = part(0)
  end
elseif not refused then
  total = total + amount
  if per and amount > 0 then
    at, size = part(-1)
    if at and now - at < tonumber(ARGV[4]) then
      redis.call('LSET', parts, -1, written(at, size + amount))
    else
      redis.call('RPUSH', parts, written(now, amount))
    end
  end
end

if total == 0 then
  redis.call('DEL', total_key, parts)
else
  local ms = exact(math.max(1, math.min(math.ceil((per or ARGV[5]) / 1000) + 1, 1e13)))
  redis.call('SET', total_key, exact(total), 'PX', ms)
  redis.call('PEXPIRE', parts, ms) -- both at once, so that they agree
end
if refused then return nil end
return exact(total)
""")
