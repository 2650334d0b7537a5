/* The C client's rate: what a client can do whose language costs next to nothing.
 *
 *   librabbitmq publish|consume HOST PORT VHOST QUEUE COUNT
 *   librabbitmq version
 *
 * publish: 256-byte persistent messages, publisher confirms, at most 1,000 unconfirmed.
 * consume: prefetch 100, one ack for each 100 deliveries; bodies are not decoded.
 * Prints one line of JSON: messages, wall and cpu seconds.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include <amqp.h>
#include <amqp_framing.h>
#include <amqp_tcp_socket.h>

#define WINDOW 1000
#define PREFETCH 100

static void fail(const char *what) {
    fprintf(stderr, "librabbitmq: %s failed.\n", what);
    exit(1);
}

static void check(amqp_connection_state_t connection, const char *what) {
    if (amqp_get_rpc_reply(connection).reply_type != AMQP_RESPONSE_NORMAL) fail(what);
}

static double wall(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static double cpu(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

/* Wait for confirms until at most `most` publications have none. */
static uint64_t confirmed_up_to(amqp_connection_state_t connection, uint64_t sent, uint64_t done,
                                uint64_t most) {
    while (sent - done > most) {
        amqp_frame_t frame;
        if (amqp_simple_wait_frame(connection, &frame) != AMQP_STATUS_OK) fail("waiting");
        if (frame.frame_type != AMQP_FRAME_METHOD) continue;
        if (frame.payload.method.id != AMQP_BASIC_ACK_METHOD) fail("a confirm");
        amqp_basic_ack_t *ack = frame.payload.method.decoded;
        done = ack->multiple ? ack->delivery_tag : done + 1;
        amqp_maybe_release_buffers(connection);
    }
    return done;
}

static void publish(amqp_connection_state_t connection, amqp_bytes_t queue, uint64_t count) {
    static char body[256];
    memset(body, 'x', sizeof body);
    amqp_bytes_t message = {sizeof body, body};
    amqp_basic_properties_t properties = {0};
    properties._flags = AMQP_BASIC_DELIVERY_MODE_FLAG;
    properties.delivery_mode = 2;
    amqp_confirm_select(connection, 1);
    check(connection, "confirm.select");
    uint64_t done = 0;
    for (uint64_t sent = 1; sent <= count; sent++) {
        if (amqp_basic_publish(connection, 1, amqp_empty_bytes, queue, 1, 0, &properties, message))
            fail("publishing");
        done = confirmed_up_to(connection, sent, done, WINDOW);
    }
    confirmed_up_to(connection, count, done, 0);
}

static void consume(amqp_connection_state_t connection, amqp_bytes_t queue, uint64_t count) {
    amqp_basic_qos(connection, 1, 0, PREFETCH, 0);
    check(connection, "basic.qos");
    amqp_basic_consume(connection, 1, queue, amqp_empty_bytes, 0, 0, 0, amqp_empty_table);
    check(connection, "basic.consume");
    for (uint64_t number = 1; number <= count; number++) {
        amqp_envelope_t envelope;
        amqp_maybe_release_buffers(connection);
        if (amqp_consume_message(connection, &envelope, NULL, 0).reply_type != AMQP_RESPONSE_NORMAL)
            fail("consuming");
        uint64_t tag = envelope.delivery_tag;
        amqp_destroy_envelope(&envelope);
        if ((number % PREFETCH == 0 || number == count) && amqp_basic_ack(connection, 1, tag, 1))
            fail("acking");
    }
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "version") == 0) {
        puts(amqp_version());
        return 0;
    }
    if (argc != 7) fail("reading the arguments");
    uint64_t count = strtoull(argv[6], NULL, 10);
    amqp_connection_state_t connection = amqp_new_connection();
    amqp_socket_t *socket = amqp_tcp_socket_new(connection);
    if (!socket || amqp_socket_open(socket, argv[2], atoi(argv[3]))) fail("connecting");
    if (amqp_login(connection, argv[4], 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, "guest", "guest")
            .reply_type != AMQP_RESPONSE_NORMAL)
        fail("the login");
    amqp_channel_open(connection, 1);
    check(connection, "channel.open");
    amqp_bytes_t queue = amqp_cstring_bytes(argv[5]);
    double wall_before = wall(), cpu_before = cpu();
    if (strcmp(argv[1], "publish") == 0)
        publish(connection, queue, count);
    else
        consume(connection, queue, count);
    printf("{\"messages\": %" PRIu64 ", \"wall\": %f, \"cpu\": %f}\n", count, wall() - wall_before,
           cpu() - cpu_before);
    amqp_connection_close(connection, AMQP_REPLY_SUCCESS);
    amqp_destroy_connection(connection);
    return 0;
}
