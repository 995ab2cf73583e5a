// SPDX-License-Identifier: Apache-2.0
// A FIFO to prove the stream helpers on. Its payload is {sum, four signed bytes}; `fault` breaks the handshake.
module fifo #(parameter DEPTH_LOG2 = 3) (
    input             clk,
    input             rst,
    input      [1:0]  fault,
    input      [49:0] in_payload,
    input             in_valid,
    output            in_ready,
    output     [49:0] out_payload,
    output            out_valid,
    input             out_ready
);
    reg [49:0] storage [0:(1 << DEPTH_LOG2) - 1];
    reg [DEPTH_LOG2:0] head, tail;
    reg [3:0] age;
    wire [DEPTH_LOG2:0] level = head - tail;
    // fault 1: valid falls now and then; fault 2: the payload changes now and then; fault 3: never gives anything
    assign in_ready = !level[DEPTH_LOG2];
    assign out_valid = (level != 0) && !(fault == 1 && age == 5) && fault != 3;
    assign out_payload = storage[tail[DEPTH_LOG2-1:0]] ^ {49'd0, fault == 2 && age == 5};
    always @(posedge clk) begin
        age <= (out_valid && !out_ready) ? age + 4'd1 : 4'd0;
        if (in_valid && in_ready) begin
            storage[head[DEPTH_LOG2-1:0]] <= in_payload;
            head <= head + 1;
        end
        if (out_valid && out_ready) tail <= tail + 1;
        if (rst) begin
            head <= 0;
            tail <= 0;
            age <= 0;
        end
    end
endmodule
