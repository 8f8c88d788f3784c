// `openai` for Node against a running server: what its documentation shows. `../python/test_public_clients.py` starts the server.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI from 'openai';
import { zodFunction, zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const { LORAMUX_URL, LORAMUX_LOCKED_URL, LORAMUX_LOCKED_KEY } = process.env;
const client = new OpenAI({ baseURL: `${LORAMUX_URL}/v1`, apiKey: 'EMPTY', maxRetries: 0, timeout: 60_000 });
const locked = new OpenAI({ baseURL: `${LORAMUX_LOCKED_URL}/v1`, apiKey: LORAMUX_LOCKED_KEY, maxRetries: 0, timeout: 60_000 });

const messages = [{ role: 'user', content: 'Tell me about the sea.' }];
const prompt = 'Tell me about the sea.\n';
const greedy = { temperature: 0, max_tokens: 20 };
const endless = { model: 'demo', prompt, max_tokens: 1500, ignore_eos: true };
const Weather = z.object({ city: z.enum(['Oslo', 'Paris']), degrees: z.number().int().min(-50).max(50) });
const tool = {
  type: 'function',
  function: {
    name: 'get_weather',
    description: 'Looks up the weather of a city.',
    parameters: { type: 'object', properties: { city: { type: 'string', enum: ['Oslo', 'Paris'] } }, required: ['city'], additionalProperties: false },
  },
};

async function collect(stream) {
  const found = [];
  for await (const each of stream) found.push(each);
  return found;
}

async function running(count) {
  for (const start = Date.now(); Date.now() - start < 20_000; await new Promise((done) => setTimeout(done, 20))) {
    const lines = (await (await fetch(`${LORAMUX_LOCKED_URL}/metrics`)).text()).split('\n');
    if (Number(lines.find((line) => line.startsWith('vllm:num_requests_running')).split(' ').at(-1)) === count) return;
  }
  assert.fail(`not within 20 s: ${count} requests run`);
}

test('completions: prompts, token ids, n, echo, logprobs', async () => {
  const alone = await client.completions.create({ model: 'sql', prompt, ...greedy, return_token_ids: true });
  const ids = alone.choices[0].prompt_token_ids;
  const several = await client.completions.create({ model: 'sql', prompt: [prompt, 'Describe coffee.\n'], ...greedy });
  assert.deepEqual(several.choices.map((choice) => choice.index), [0, 1]);
  const fromIds = await client.completions.create({ model: 'sql', prompt: [ids, ids], ...greedy });
  for (const choice of [several.choices[0], ...fromIds.choices]) assert.equal(choice.text, alone.choices[0].text);
  const best = await client.completions.create({ model: 'demo', prompt, n: 2, best_of: 3, max_tokens: 4, logprobs: 2, echo: true });
  assert.equal(best.choices.length, 2);
  assert.equal(best.choices[0].logprobs.token_logprobs[0], null);
});

test('chat: whole, streamed, usage, seed, stop, logprobs', async () => {
  const whole = await client.chat.completions.create({ model: 'pirate', messages, ...greedy });
  const chunks = await collect(
    await client.chat.completions.create({ model: 'pirate', messages, ...greedy, stream: true, stream_options: { include_usage: true } }),
  );
  assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join(''), whole.choices[0].message.content);
  assert.deepEqual(chunks.at(-1).usage, whole.usage);
  const drawn = { model: 'demo', messages, seed: 5, temperature: 1.3, max_completion_tokens: 8, n: 2, logprobs: true, top_logprobs: 2, stop: ['zzz'] };
  const [first, second] = [await client.chat.completions.create(drawn), await client.chat.completions.create(drawn)];
  assert.deepEqual(first.choices, second.choices);
  assert.equal(first.choices[0].logprobs.content[0].top_logprobs.length, 2);
});

test('the streaming helper, readable streams and split streams', async () => {
  const whole = (await client.chat.completions.create({ model: 'haiku', messages, ...greedy })).choices[0].message.content;
  const deltas = [];
  const stream = client.chat.completions.stream({ model: 'haiku', messages, ...greedy }).on('content', (delta) => deltas.push(delta));
  assert.equal(await stream.finalContent(), whole);
  assert.equal(deltas.join(''), whole);
  const [left, right] = (await client.chat.completions.create({ model: 'haiku', messages, ...greedy, stream: true })).tee();
  assert.deepEqual(await collect(left), await collect(right));
  const passedOn = (await client.chat.completions.create({ model: 'haiku', messages, ...greedy, stream: true })).toReadableStream();
  assert.ok((await collect(passedOn)).length > 1);
});

test('models', async () => {
  const names = (await collect(client.models.list())).map((model) => model.id);
  for (const name of ['demo', 'pirate', 'haiku', 'sql', 'shout']) assert.ok(names.includes(name), name);
  for (const name of names) assert.equal((await client.models.retrieve(name)).id, name);
  await assert.rejects(client.models.retrieve('nobody'), OpenAI.NotFoundError);
});

test('adapters by name and by fields the package does not know', async () => {
  const say = async (more) => (await client.chat.completions.create({ messages, ...greedy, ...more })).choices[0].message.content;
  const shout = await say({ model: 'shout' });
  assert.equal(await say({ model: 'demo', adapter_id: 'shout' }), shout);
  assert.equal(await say({ model: 'demo', compose: [{ adapter: 'shout', weight: 1 }] }), shout);
  assert.notEqual(await say({ model: 'demo' }), shout);
  assert.equal(await say({ model: 'shout', adapter_scale: 0 }), await say({ model: 'demo' }));
});

test('raw responses and request ids', async () => {
  const { data, response, request_id } = await client.chat.completions
    .create({ model: 'sql', messages, ...greedy }, { headers: { 'x-request-id': 'mine-1' } })
    .withResponse();
  assert.equal(request_id, 'mine-1');
  assert.equal(data._request_id, 'mine-1');
  assert.equal(response.headers.get('x-adapter-id'), 'sql');
  assert.equal((await client.get('/models')).object, 'list');
});

test('errors have their classes', async () => {
  const cases = [
    [OpenAI.BadRequestError, 'invalid_value', { model: 'demo', messages, temperature: -1 }],
    [OpenAI.BadRequestError, 'context_length_exceeded', { model: 'demo', messages, max_tokens: 1_000_000 }],
    [OpenAI.NotFoundError, 'model_not_found', { model: 'nobody', messages }],
  ];
  for (const [kind, code, body] of cases) {
    for (const stream of [false, true]) {
      await assert.rejects(client.chat.completions.create({ ...body, stream }), (error) => {
        assert.ok(error instanceof kind);
        assert.equal(error.code, code);
        assert.ok(error.requestID);
        return true;
      });
    }
  }
  await assert.rejects(locked.withOptions({ apiKey: 'wrong' }).models.list(), OpenAI.AuthenticationError);
});

test('a busy server is asked again', async () => {
  await running(0);
  const first = await locked.completions.create({ ...endless, stream: true });
  await first[Symbol.asyncIterator]().next();
  await assert.rejects(locked.completions.create({ model: 'demo', prompt, max_tokens: 1 }), OpenAI.RateLimitError);
  setTimeout(() => first.controller.abort(), 300);
  const reply = await locked.withOptions({ maxRetries: 5 }).completions.create({ model: 'demo', prompt, max_tokens: 1 });
  assert.equal(reply.usage.completion_tokens, 1);
});

test('aborting, breaking and timeouts cancel', async () => {
  await running(0);
  for await (const _ of await locked.completions.create({ ...endless, stream: true })) {
    await running(1);
    break;
  }
  await running(0);
  const controller = new AbortController();
  const asked = locked.completions.create(endless, { signal: controller.signal });
  const refused = assert.rejects(asked, OpenAI.APIUserAbortError);
  await running(1);
  controller.abort();
  await refused;
  await running(0);
  await assert.rejects(locked.completions.create(endless, { timeout: 500 }), OpenAI.APIConnectionTimeoutError);
  await running(0);
});

test('structured output', async () => {
  const body = { model: 'demo', messages, temperature: 0, max_tokens: 100, response_format: zodResponseFormat(Weather, 'weather') };
  const reply = await client.chat.completions.parse(body);
  assert.ok(['Oslo', 'Paris'].includes(reply.choices[0].message.parsed.city));
  const streamed = await client.chat.completions.stream(body).finalChatCompletion();
  assert.deepEqual(streamed.choices[0].message.parsed, reply.choices[0].message.parsed);
});

test('tools: required, named, streamed, answered', async () => {
  const body = { model: 'demo', messages, temperature: 0, max_tokens: 100, tools: [tool] };
  for (const tool_choice of ['required', { type: 'function', function: { name: 'get_weather' } }]) {
    const { message } = (await client.chat.completions.create({ ...body, tool_choice })).choices[0];
    const [call] = message.tool_calls;
    assert.equal(call.function.name, 'get_weather');
    assert.ok(['Oslo', 'Paris'].includes(JSON.parse(call.function.arguments).city));
    const streamed = await client.chat.completions.stream({ ...body, tool_choice }).finalMessage();
    assert.deepEqual(streamed.tool_calls.map((each) => each.function.arguments), message.tool_calls.map((each) => each.function.arguments));
    const turn = [...messages, message, ...message.tool_calls.map((each) => ({ role: 'tool', tool_call_id: each.id, content: 'Rain.' }))];
    assert.ok((await client.chat.completions.create({ ...body, messages: turn, tool_choice: 'none' })).choices[0].message.content);
  }
});

test('tools: the runner', async () => {
  const asked = [];
  const weather = zodFunction({ name: 'get_weather', parameters: Weather, function: (given) => (asked.push(given), 'Rain.') });
  const runner = client.chat.completions.runTools(
    { model: 'demo', messages, temperature: 0, max_tokens: 100, tools: [weather], tool_choice: { type: 'function', function: { name: 'get_weather' } } },
    { maxChatCompletions: 1 },
  );
  await runner.done();
  assert.ok(['Oslo', 'Paris'].includes(asked[0].city));
});

test('embeddings', async () => {
  const reply = await client.embeddings.create({ model: 'demo', input: ['The sea is deep.', 'Coffee is hot.'] });
  assert.equal(reply.data.length, 2);
  const plain = await client.embeddings.create({ model: 'demo', input: 'The sea is deep.', encoding_format: 'float' });
  plain.data[0].embedding.forEach((value, i) => assert.ok(Math.abs(value - reply.data[0].embedding[i]) < 1e-5));
});

test('responses', async () => {
  const body = { model: 'pirate', input: 'Tell me about the sea.', temperature: 0, max_output_tokens: 100 };
  const reply = await client.responses.create(body);
  assert.ok(reply.output_text);
  const events = await collect(await client.responses.create({ ...body, stream: true }));
  const deltas = events.filter((event) => event.type === 'response.output_text.delta');
  assert.equal(deltas.map((event) => event.delta).join(''), reply.output_text);
  const stream = client.responses.stream(body);
  assert.equal((await stream.finalResponse()).output_text, reply.output_text);
  const parsed = await client.responses.parse({ ...body, max_output_tokens: 100, text: { format: zodTextFormat(Weather, 'weather') } });
  assert.ok(['Oslo', 'Paris'].includes(parsed.output_parsed.city));
});
