// A client of homer.v1.LongContext made from the .proto files alone. Prints what it got as JSON.
// node client.js ADDRESS PROTO_FOLDER SERVICE_CONFIG

'use strict';

const fs = require('fs');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const [address, protos, config] = process.argv.slice(2);
const definition = loader.loadSync('homer/v1/long_context.proto', {
  includeDirs: [protos],
  keepCase: true,
  longs: Number,
  enums: String,
  oneofs: true,
});
const { LongContext } = grpc.loadPackageDefinition(definition).homer.v1;
const client = new LongContext(address, grpc.credentials.createInsecure(), {
  'grpc.service_config': fs.readFileSync(config, 'utf8'),
});

const DOCUMENT = 'Ærøskøbing 🦊 jumps over the lazy dog. '.repeat(12);
const QUESTION = ' What jumps?';
const SAMPLING = { max_tokens: 8 };

// The events of a call, and how it ended.
function follow(call, onEvent = () => {}) {
  return new Promise((resolve) => {
    const events = [];
    call.on('data', (message) => {
      events.push(message);
      onEvent(message, events.length);
    });
    call.on('error', (error) => resolve({ events, error }));
    call.on('end', () => resolve({ events }));
  });
}

function unary(method, request) {
  return new Promise((resolve) => {
    client[method](request, (error, response) => resolve(error ? { error } : response));
  });
}

async function main() {
  const text = { context: DOCUMENT, suffix: QUESTION };
  const whole = await follow(client.Generate({ text, sampling: SAMPLING }));

  const upload = client.GenerateFromStream();
  const uploading = follow(upload);
  upload.write({ request: { text: { suffix: QUESTION }, sampling: SAMPLING } });
  const bytes = Buffer.from(DOCUMENT);
  // Pieces of 13 bytes: characters of two and four bytes are cut.
  for (let at = 0; at < bytes.length; at += 13) {
    upload.write({ context_utf8: bytes.subarray(at, at + 13) });
  }
  upload.end();
  const pieces = await uploading;

  let aborted;
  const long = { context: DOCUMENT.repeat(60), suffix: QUESTION };
  const abortable = await follow(
    client.Generate({ text: long, request_id: 'from-node' }),
    (event, count) => {
      if (count === 1) aborted = unary('Abort', { request_id: 'from-node' });
    },
  );

  const refused = await follow(client.Generate({ text: { suffix: QUESTION } }));
  const unknown = await unary('Abort', { request_id: 'nobody' });
  const last = (events) => events[events.length - 1].summary;
  console.log(
    JSON.stringify({
      kinds: whole.events.map((message) => message.event),
      tokens: whole.events.filter((m) => m.event === 'token').map((m) => m.token.token_id),
      summary: last(whole.events),
      uploaded: last(pieces.events),
      aborted: await aborted,
      abort_code: abortable.error.code,
      refused: { code: refused.error.code, details: refused.error.details },
      rich: refused.error.metadata.get('grpc-status-details-bin').length,
      unknown: unknown.error.code,
      counts: await unary('CountTokens', { text }),
      info: await unary('GetModelInfo', {}),
    }),
  );
  client.close();
}

main();
